"""The per-vector scheme: layers that store their matrix in 8 or 4 bits per weight and dequantize it for each use.

Only the codes stay in memory; a forward pass builds one layer's float matrix and frees it. The factors A and B of a
low-rank layer are replaced too, one by one, see `replace`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from finhpc.quantization.frozen import FrozenLinear, Scheme, Tensors
from finhpc.quantization.per_vector import BITS, Vectors, dequantize, pack_bits, packed_columns, quantize, unpack_bits

MINMAX = "finhpc_minmax"  # the scheme's name in a model's config.json


class QuantizedMatrix(nn.Module):
    """A matrix (rows, columns) quantized by rows.

    `weight`: uint8 (rows, `packed_columns(columns, bits)`, 1), a buffer like the others, as nothing here is trained.
    The third dimension protects programs that do not know the scheme: transformers only warns about an unknown one,
    and would load codes of the matrix's own shape as weights.
    `scale`, `zero`: float32 (rows,), even if the model is cast to another type.
    `tensors`: these three, if they exist already.
    """

    weight: Tensor
    scale: Tensor
    zero: Tensor
    probe: Tensor

    def __init__(self, rows: int, columns: int, bits: int, tensors: Tensors | None = None) -> None:
        nn.Module.__init__(self)  # not `FrozenLinear`'s, which is next for a `QuantizedLinear`
        self.rows, self.columns, self.bits = rows, columns, bits
        if tensors is None:
            codes = torch.empty(rows, packed_columns(columns, bits), 1, dtype=torch.uint8)
            # float32 even if torch's default type is another, as in from_pretrained
            scale, zero = (torch.empty(rows, dtype=torch.float32) for _ in range(2))
            tensors = {"weight": codes, "scale": scale, "zero": zero}
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.contiguous())
        self.register_buffer("probe", torch.empty(0), persistent=False)  # is cast with the model and tells its type

    @property
    def codes(self) -> Tensor:
        """The codes as `finhpc.quantization.per_vector.pack_bits` returns them, (rows, packed columns)."""
        return self.weight.squeeze(-1)

    def dequantized(self) -> Tensor:
        """Return the float32 matrix (rows, columns)."""
        return dequantize(Vectors(unpack_bits(self.codes, self.bits, self.columns), self.scale, self.zero))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        scale, zero = self.scale, self.zero
        super()._apply(fn, recurse)
        if not scale.is_meta:  # in 16 bits the rounding of the scale would exceed that of the codes
            self.scale, self.zero = scale.to(self.scale.device), zero.to(self.zero.device)
        return self


class QuantizedLinear(QuantizedMatrix, FrozenLinear):
    """y = W x + bias with W (out_features, in_features) quantized; maps (..., in_features) to (..., out_features).

    Models that are opened to be used have it, and so has the frozen base of finetuning.
    """

    def __init__(self, shape: tuple[int, int], bits: int, bias: Tensor | None, tensors: Tensors | None = None) -> None:
        super().__init__(*shape, bits, tensors)
        self.out_features, self.in_features = shape
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        return self.dequantized().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.requires_grad else self.product(x)


class QuantizedEmbedding(QuantizedMatrix):
    """Dequantizes the row of each token; maps int64 (...) to (..., dim)."""

    def __init__(self, num_embeddings: int, dim: int, bits: int) -> None:
        super().__init__(num_embeddings, dim, bits)
        self.num_embeddings, self.embedding_dim = num_embeddings, dim

    def forward(self, tokens: Tensor) -> Tensor:
        codes = unpack_bits(self.codes[tokens], self.bits, self.columns)
        return dequantize(Vectors(codes, self.scale[tokens], self.zero[tokens])).to(self.probe.dtype)


class TiedHead(nn.Module):
    """The output layer whose matrix is the quantized embedding; maps (..., dim) to (..., num_embeddings)."""

    def __init__(self, embedding: QuantizedEmbedding) -> None:
        super().__init__()
        self.embedding = (embedding,)  # a tuple hides its tensors from this module

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.embedding[0].dequantized().to(x.dtype))


class MinMax(Scheme):
    """The paper's per-vector scheme, see `finhpc.quantization.per_vector`."""

    bits = BITS
    embeddings = True

    def tensors(self, matrix: Tensor, bits: int, name: str) -> Tensors:
        """Return the buffers of a `QuantizedMatrix`."""
        codes, scale, zero = quantize(matrix, bits, name)
        return {"weight": pack_bits(codes, bits).unsqueeze(-1), "scale": scale, "zero": zero}

    def config(self, bits: int, keep: list[str]) -> dict[str, object]:
        return {"quant_method": MINMAX, "bits": bits}

    def frozen(self, tensors: Tensors, shape: tuple[int, int], bias: Tensor | None, bits: int) -> FrozenLinear:
        return QuantizedLinear(shape, bits, bias, tensors)

    def empty(self, shape: tuple[int, int], bias: Tensor | None, bits: int) -> FrozenLinear:
        return QuantizedLinear(shape, bits, bias)


def replace(model: nn.Module, bits: int) -> None:
    """Replace every linear layer and embedding of `model` by an empty quantized one, on its device."""
    for name, module in list(model.named_modules()):
        if isinstance(module, (nn.Linear, Conv1D, nn.Embedding)):
            model.set_submodule(name, _empty_twin(module, bits))


def _empty_twin(module: nn.Linear | Conv1D | nn.Embedding, bits: int) -> QuantizedMatrix:
    with module.weight.device:
        if isinstance(module, nn.Embedding):
            return QuantizedEmbedding(module.num_embeddings, module.embedding_dim, bits)
        if isinstance(module, Conv1D):  # stores (in, out)
            in_features, out_features = module.weight.shape
        else:
            in_features, out_features = module.in_features, module.out_features
        bias = None if module.bias is None else torch.zeros(out_features)
        return QuantizedLinear((out_features, in_features), bits, bias)
