"""Linear layers whose weights never change, in float or quantized: the base that adapters are trained on.

They compute no weight gradient. A quantized matrix is dequantized for each product, forward and backward, so a stage
holds one float matrix at a time. int8 and NF4 give the results of bitsandbytes' own layers: int8 also rounds a layer's
input, and computes columns with values of 6 and more in float (LLM.int8).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finhpc.quantization.layers import QuantizedMatrix
from finhpc.quantization.per_vector import packed_columns
from finhpc.quantization.schemes import SCHEMES

Tensors = dict[str, Tensor]
OUTLIER = 6.0  # bitsandbytes' default threshold in transformers


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

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        return FrozenProduct.apply(x, self)  # type: ignore[no-untyped-call, no-any-return]

    def _store(self, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            # Contiguous, as on disk: products of a transposed matrix are rounded differently.
            self.register_buffer(name, tensor.contiguous(), persistent=False)


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
        self._store(weight=rows)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        return self.weight.to(dtype)


class FrozenInt8(FrozenLinear):
    """bitsandbytes' `Linear8bitLt`: codes, and each row's largest absolute value."""

    codes: Tensor
    largest: Tensor

    def __init__(self, tensors: Tensors, shape: tuple[int, int], bias: Tensor | None) -> None:
        super().__init__(shape, bias)
        self._store(codes=tensors["weight"], largest=tensors["SCB"])

    def matrix(self, dtype: torch.dtype) -> Tensor:
        return self.codes.to(dtype, copy=True).mul_(self.largest.unsqueeze(1).mul(1.0 / 127.0))

    def product(self, x: Tensor) -> Tensor:
        if self.training and x.device.type in ("cpu", "xpu"):  # as bitsandbytes' matmul chooses
            return super().product(x)
        from bitsandbytes.functional import int8_vectorwise_quant

        codes, largest, outliers = int8_vectorwise_quant(x.to(torch.float16), threshold=OUTLIER)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        product = torch.ops.bitsandbytes.int8_mixed_scaled_mm
        out: Tensor = product(x, codes, self.codes, largest, self.largest, outliers, bias)[0]
        return out


class FrozenNf4(FrozenLinear):
    """bitsandbytes' `Linear4bit`: NF4 codes in blocks of 64 (or 32) with 8-bit scales, which `state` holds."""

    codes: Tensor

    def __init__(self, codes: Tensor, state: Any, shape: tuple[int, int], bias: Tensor | None) -> None:
        super().__init__(shape, bias)
        self.state = state
        self._store(codes=codes)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        from bitsandbytes.functional import dequantize_blockwise

        state = self.state
        scales = (dequantize_blockwise(state.absmax, state.state2) + state.offset).float()
        matrix: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
            self.codes, scales, state.blocksize, "nf4", state.shape, dtype
        )
        return matrix


class FrozenMinMax(FrozenLinear):
    """The paper's per-vector scheme at 8 or 4 bits."""

    def __init__(self, tensors: Tensors, shape: tuple[int, int], bias: Tensor | None, bits: int) -> None:
        super().__init__(shape, bias)
        self.quantized = QuantizedMatrix(*shape, bits, tensors)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        return self.quantized.dequantized().to(dtype)


def is_quantized(shape: tuple[int, int], bits: int, scheme: str) -> bool:
    """Return whether `freeze` quantizes a matrix of this shape: NF4 needs sides that are multiples of 32."""
    return bits < 16 and SCHEMES[scheme].fits(*shape)


def freeze(rows: Tensor, bias: Tensor | None, bits: int, scheme: str, dtype: torch.dtype, name: str) -> FrozenLinear:
    """Build the frozen layer of a matrix (out, in). `scheme`: int8, nf4 or minmax; `dtype`: of unquantized tensors.

    Raises `ConfigError` naming `name` if int8 cannot represent it, `NonFiniteError` if it has NaN.
    """
    shape = (rows.shape[0], rows.shape[1])
    if not is_quantized(shape, bits, scheme):
        return FrozenFloat(rows.to(dtype), None if bias is None else bias.to(dtype))
    return frozen_from_tensors(SCHEMES[scheme].tensors(rows, bits, name), shape, bias, bits, scheme, dtype)


def frozen_from_tensors(
    tensors: Tensors, shape: tuple[int, int], bias: Tensor | None, bits: int, scheme: str, dtype: torch.dtype
) -> FrozenLinear:
    """Build the frozen layer of a matrix (out, in) that is already quantized into its scheme's `tensors`."""
    bias = None if bias is None else bias.to(dtype)
    if scheme == "int8":
        return FrozenInt8(tensors, shape, bias)
    if scheme == "minmax":
        return FrozenMinMax(tensors, shape, bias, bits)
    from bitsandbytes.functional import QuantState

    state = {key.removeprefix("weight."): value for key, value in tensors.items() if key != "weight"}
    return FrozenNf4(tensors["weight"], QuantState.from_dict(state, tensors["weight"].device), shape, bias)


def empty_frozen(
    shape: tuple[int, int], bias: Tensor | None, bits: int, scheme: str, dtype: torch.dtype
) -> FrozenLinear:
    """Build the layer of `freeze` with uninitialized tensors on torch's current device and mode, to count memory."""
    out, into = shape
    bias = None if bias is None else bias.to(dtype)
    if not is_quantized(shape, bits, scheme):
        return FrozenFloat(torch.empty(shape, dtype=dtype), bias)
    if scheme == "int8":
        return FrozenInt8({"weight": torch.empty(shape, dtype=torch.int8), "SCB": torch.empty(out)}, shape, bias)
    if scheme == "minmax":
        codes = torch.empty(out, packed_columns(into, bits), 1, dtype=torch.uint8)
        return FrozenMinMax({"weight": codes, "scale": torch.empty(out), "zero": torch.empty(out)}, shape, bias, bits)
    from bitsandbytes.functional import QuantState

    block = 64 if into % 64 == 0 else 32
    count = out * into // block
    absmax = torch.empty(-(-count // 256))
    second = QuantState(absmax=absmax, code=torch.empty(256), blocksize=256, dtype=torch.float32)
    state = QuantState(
        absmax=torch.empty(count, dtype=torch.uint8), shape=torch.Size(shape), code=torch.empty(16), blocksize=block,
        quant_type="nf4", dtype=torch.float32, offset=torch.empty(()), state2=second,
    )  # fmt: skip
    return FrozenNf4(torch.empty(out * into // 2, 1, dtype=torch.uint8), state, shape, bias)
