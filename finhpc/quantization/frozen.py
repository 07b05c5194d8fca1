"""Linear layers whose weights never change: the base that adapters are trained on. And what a quantization scheme is.

The layers compute no weight gradient. A quantized matrix is dequantized for each product, forward and backward, so a
stage holds one float matrix at a time.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Tensors = dict[str, Tensor]


class FrozenLinear(nn.Module):
    """y = W x + bias; `matrix(dtype)` returns W (out_features, in_features)."""

    def __init__(self, shape: tuple[int, int], bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.register_buffer("bias", bias, persistent=False)
        self.bias: Tensor | None

    def matrix(self, dtype: torch.dtype) -> Tensor:
        raise NotImplementedError

    def product(self, x: Tensor) -> Tensor:
        """Compute W x + bias for x (rows, in_features), outside of autograd."""
        return F.linear(x, self.matrix(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def as_product(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and W, as `LowRankLinear.as_product`."""
        return x, self.matrix(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        return FrozenProduct.apply(x, self)  # type: ignore[no-untyped-call, no-any-return]


class FrozenProduct(torch.autograd.Function):
    """A frozen layer's product; the backward pass dequantizes its matrix again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        return layer.product(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], layer.out_features)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0] @ ctx.layer.matrix(gradients[0].dtype), None


class FrozenFloat(FrozenLinear):
    """A matrix in float32 or bfloat16."""

    weight: Tensor

    def __init__(self, rows: Tensor, bias: Tensor | None) -> None:
        super().__init__((rows.shape[0], rows.shape[1]), bias)
        # Contiguous, as on disk: products of a transposed matrix are rounded differently.
        self.register_buffer("weight", rows.contiguous(), persistent=False)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        return self.weight.to(dtype)


class Scheme:
    """A way to store matrices (out, in) in few bits; a row of `finhpc.quantization.schemes.SCHEMES`."""

    bits: ClassVar[tuple[int, ...]]  # those it has, out of 8 and 4
    embeddings: ClassVar[bool] = False  # whether embeddings are quantized too
    needs: ClassVar[str] = "matrices of any size"  # what `fits` is true for, in words

    def fits(self, rows: int, columns: int) -> bool:
        """Return whether a matrix of that shape can be quantized."""
        return True

    def tensors(self, matrix: Tensor, bits: int, name: str) -> Tensors:
        """Quantize a matrix: key after the module's name -> tensor, as a model's files store it.

        Raises `FinhpcError` naming `name` if the matrix cannot be represented.
        """
        raise NotImplementedError

    def config(self, bits: int, keep: list[str]) -> dict[str, object]:
        """Return the `quantization_config` of config.json, by which transformers opens the model.

        `keep`: the linear modules that stay in float.
        """
        raise NotImplementedError

    def frozen(self, tensors: Tensors, shape: tuple[int, int], bias: Tensor | None, bits: int) -> FrozenLinear:
        """Build the frozen layer of a matrix from its `tensors`."""
        raise NotImplementedError

    def empty(self, shape: tuple[int, int], bias: Tensor | None, bits: int) -> FrozenLinear:
        """Build a layer like `frozen`, uninitialized, on torch's current device and mode, to count memory."""
        raise NotImplementedError
