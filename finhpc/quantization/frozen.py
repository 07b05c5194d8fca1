"""Linear layers whose weights never change: in float, or quantised; what adapters are trained beside.

No gradient of a weight is computed. Quantised ones are turned back into a float matrix for each product, forward
and backward, so that a stage holds one such matrix at a time. int8 and NF4 give the numbers of bitsandbytes' own
layers: int8 rounds a layer's input too, and computes columns with values of 6 and more in float (LLM.int8).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finhpc.quantization.per_vector import Vectors, dequantize, unpack
from finhpc.quantization.schemes import SCHEMES

Tensors = dict[str, Tensor]
OUTLIER = 6.0  # bitsandbytes' default threshold in transformers


class FrozenLinear(nn.Module):
    """y = W x + bias for x (rows, in_features); `matrix(dtype)` is W (out_features, in_features)."""

    def __init__(self, out_features: int, in_features: int, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = out_features, in_features
        self.register_buffer("bias", bias, persistent=False)
        self.bias: Tensor | None

    def matrix(self, dtype: torch.dtype) -> Tensor:
        raise NotImplementedError

    def product(self, x: Tensor) -> Tensor:
        """W x + bias, outside of autograd."""
        return F.linear(x, self.matrix(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., in_features) to (..., out_features)."""
        return FrozenProduct.apply(x, self)  # type: ignore[no-untyped-call, no-any-return]

    def _hold(self, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            # In rows, as they come from disk: products of a transposed matrix are rounded otherwise.
            self.register_buffer(name, tensor.contiguous(), persistent=False)


class FrozenProduct(torch.autograd.Function):
    """A frozen layer's product; backward is the product with its matrix, made again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        return layer.product(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], layer.out_features)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0] @ ctx.layer.matrix(gradients[0].dtype), None


class FrozenFloat(FrozenLinear):
    """The matrix as it is, in float32 or bfloat16."""

    weight: Tensor

    def __init__(self, rows: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(rows.shape[0], rows.shape[1], bias)
        self._hold(weight=rows.to(dtype))

    def matrix(self, dtype: torch.dtype) -> Tensor:
        return self.weight.to(dtype)


class FrozenInt8(FrozenLinear):
    """bitsandbytes' `Linear8bitLt`: a code and each row's largest absolute value."""

    codes: Tensor
    largest: Tensor

    def __init__(self, held: Tensors, shape: tuple[int, int], bias: Tensor | None) -> None:
        super().__init__(*shape, bias)
        self._hold(codes=held["weight"], largest=held["SCB"])

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
    """bitsandbytes' `Linear4bit` with NF4 codes in blocks of 64 (or 32), and their scales in 8 bits."""

    packed: Tensor

    def __init__(self, held: Tensors, shape: tuple[int, int], bias: Tensor | None) -> None:
        from bitsandbytes.functional import QuantState

        super().__init__(*shape, bias)
        state = {key.removeprefix("weight."): value for key, value in held.items() if key != "weight"}
        self.state = QuantState.from_dict(state, held["weight"].device)
        self._hold(packed=held["weight"])

    def matrix(self, dtype: torch.dtype) -> Tensor:
        from bitsandbytes.functional import dequantize_blockwise

        state = self.state
        scales = (dequantize_blockwise(state.absmax, state.state2) + state.offset).float()
        made: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
            self.packed, scales, state.blocksize, "nf4", state.shape, dtype
        )
        return made


class FrozenMinMax(FrozenLinear):
    """The paper's per-vector scheme at 8 or 4 bits, packed."""

    codes: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, held: Tensors, shape: tuple[int, int], bias: Tensor | None, bits: int) -> None:
        super().__init__(*shape, bias)
        self.bits = bits
        self._hold(codes=held["weight"].squeeze(-1), scale=held["scale"], zero=held["zero"])

    def matrix(self, dtype: torch.dtype) -> Tensor:
        return dequantize(Vectors(unpack(self.codes, self.bits, self.in_features), self.scale, self.zero)).to(dtype)


def is_quantized(shape: tuple[int, int], bits: int, scheme: str) -> bool:
    """Whether `freeze` quantises a matrix of this shape: NF4 leaves those whose sides are not multiples of 32."""
    return bits < 16 and SCHEMES[scheme].fits(*shape)


def freeze(rows: Tensor, bias: Tensor | None, bits: int, scheme: str, dtype: torch.dtype, name: str) -> FrozenLinear:
    """The frozen layer of a matrix (out, in). `scheme`: int8, nf4 or minmax; `dtype`: of what stays in float.

    Raises `ConfigError` naming `name` where int8 cannot hold it, `NonFiniteError` where it holds NaN.
    """
    shape = (rows.shape[0], rows.shape[1])
    if not is_quantized(shape, bits, scheme):
        return FrozenFloat(rows, None if bias is None else bias.to(dtype), dtype)
    return hold(SCHEMES[scheme].tensors(rows, bits, name), shape, bias, bits, scheme, dtype)


def hold(
    held: Tensors, shape: tuple[int, int], bias: Tensor | None, bits: int, scheme: str, dtype: torch.dtype
) -> FrozenLinear:
    """The frozen layer of a matrix (out, in) that is quantised already: `held` is what its `Scheme` made of it."""
    bias = None if bias is None else bias.to(dtype)
    if scheme == "int8":
        return FrozenInt8(held, shape, bias)
    return FrozenNf4(held, shape, bias) if scheme == "nf4" else FrozenMinMax(held, shape, bias, bits)


def hollow(shape: tuple[int, int], bias: Tensor | None, bits: int, scheme: str, dtype: torch.dtype) -> FrozenLinear:
    """`freeze` of a matrix (out, in) whose content does not matter: what counting memory needs.

    Its tensors have the shapes and types of the real one's, made on torch's current device and mode.
    """
    out, into = shape
    bias = None if bias is None else bias.to(dtype)
    kind: type[FrozenLinear] = {"int8": FrozenInt8, "nf4": FrozenNf4, "minmax": FrozenMinMax}.get(scheme, FrozenFloat)
    if not is_quantized(shape, bits, scheme):
        kind = FrozenFloat
    made = kind.__new__(kind)
    FrozenLinear.__init__(made, out, into, bias)
    if isinstance(made, FrozenInt8):
        made._hold(codes=torch.empty(shape, dtype=torch.int8), largest=torch.empty(out))
    elif isinstance(made, FrozenNf4):
        made._hold(packed=torch.empty(out * into // 2, 1, dtype=torch.uint8))
        made.state = _hollow_state(shape)
    elif isinstance(made, FrozenMinMax):
        made.bits = bits
        codes = torch.empty(out, -(-into * bits // 8), dtype=torch.uint8)
        made._hold(codes=codes, scale=torch.empty(out), zero=torch.empty(out))
    else:
        made._hold(weight=torch.empty(shape, dtype=dtype))
    return made


def _hollow_state(shape: tuple[int, int]) -> Any:
    """bitsandbytes' state of an NF4 matrix: a scale for 64 (or 32) codes in 8 bits, and one for 256 scales."""
    from bitsandbytes.functional import QuantState

    block = 64 if shape[1] % 64 == 0 else 32
    scales = shape[0] * shape[1] // block
    second = QuantState(
        absmax=torch.empty(-(-scales // 256)), code=torch.empty(256), blocksize=256, dtype=torch.float32
    )
    return QuantState(
        absmax=torch.empty(scales, dtype=torch.uint8),
        shape=torch.Size(shape),
        code=torch.empty(16),
        blocksize=block,
        quant_type="nf4",
        dtype=torch.float32,
        offset=torch.empty(()),
        state2=second,
    )
