"""Replace layers by ones that are faster when few tokens are computed at a time.

Decoding reads every weight once per token, so bytes decide: B (A x) stays if the factors have fewer bytes than B A,
otherwise B A is multiplied out; quantized rows go to kernels that multiply codes, and are never turned into floats.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finhpc.lowrank.layers import LowRankLinear
from finhpc.quantization.layers import QuantizedLinear
from finhpc.quantization.per_vector import unpack_bits

CALL_WEIGHTS = 40_000  # weights that can be read in the time of one more call; measured: 4 us at 20 GB/s, bf16
FEW_ROWS = 128  # beyond it, dequantizing 8-bit rows once is cheaper than torch's kernel for few rows
ALIGNMENT = 64  # bytes, as torch allocates
BYTE_COLUMNS = 16  # torch 2.13's 8-bit kernel reads so many at once, beyond the end of rows of other lengths
OFFSET = 128  # from uint8 codes to int8
GROUPS = (256, 128, 64, 32)  # columns that share a scale in torch's 4-bit kernel


def use_fast_layers(model: nn.Module) -> dict[str, int]:
    """Replace layers of `model` by faster ones; returns how many of each kind: merged, kernel_8, kernel_4.

    A new layer takes over the tensors of the old one, so memory does not grow; `model` must not be saved afterwards.
    """
    counts = {"merged": 0, "kernel_8": 0, "kernel_4": 0}
    for name, module in list(model.named_modules()):
        fast: Any = None
        if isinstance(module, LowRankLinear) and module.mergeable and _merged_is_smaller(module):
            fast, kind = _merged(module), "merged"
        elif isinstance(module, QuantizedLinear) and module.probe.dtype == torch.bfloat16 and not module.weight.is_cuda:
            kind = f"kernel_{module.bits}"
            if module.bits == 8 and module.columns % BYTE_COLUMNS == 0:
                fast = Int8Linear.of_minmax(module)
            elif module.bits == 4 and module.columns % GROUPS[-1] == 0:
                fast = Int4Linear(module)
        # by name: bitsandbytes is imported only if a model needs it
        elif type(module).__name__ == "Linear8bitLt" and module.in_features % BYTE_COLUMNS == 0:
            fast, kind = Int8Linear.of_bitsandbytes(module), "kernel_8"
        if fast is not None:
            model.set_submodule(name, fast)
            counts[kind] += 1
    return counts


def _merged_is_smaller(layer: LowRankLinear) -> bool:
    if type(layer.A) is not nn.Linear:  # quantized
        return False
    dense = layer.in_features * layer.out_features
    return layer.rank * (layer.in_features + layer.out_features) + CALL_WEIGHTS >= dense


def _merged(layer: LowRankLinear) -> nn.Linear:
    a, b = (factor.detach() for factor in layer.pair())
    with torch.device("meta"):
        merged = nn.Linear(layer.in_features, layer.out_features, bias=False)
    merged.weight = nn.Parameter(layer.product(a.float(), b.float()).to(a.dtype), requires_grad=False)
    merged.bias = layer.B.bias
    return merged


class Int8Linear(nn.Module):
    """y = (scale * codes + zero) x + bias, with int8 codes (out, in); zero may be None.

    bfloat16 inputs go through torch's kernel, which sums codes; scale and zero follow in float32.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    ones: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None) -> None:
        super().__init__()
        # Codes mapped from a file may be unaligned, and then torch 2.13's kernel crashes from 5 rows on.
        self.register_buffer("codes", codes.clone() if codes.data_ptr() % ALIGNMENT else codes)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)
        self.register_buffer("ones", torch.ones_like(scale, dtype=torch.bfloat16))
        self.bias = bias

    @classmethod
    def of_minmax(cls, layer: QuantizedLinear) -> Int8Linear:
        """Take over a `QuantizedLinear` of 8 bits, with its codes lowered by OFFSET in the same memory."""
        codes = layer.codes.bitwise_xor_(OFFSET).view(torch.int8)
        return cls(codes, layer.scale, layer.zero + OFFSET * layer.scale, layer.bias)

    @classmethod
    def of_bitsandbytes(cls, layer: Any) -> Int8Linear:
        """Take over bitsandbytes' `Linear8bitLt`, which itself also rounds inputs, depending on the whole batch."""
        codes, largest = layer.weight.data, layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
        return cls(codes, largest.float() / 127, None, layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if x.dtype != torch.bfloat16 or x.is_cuda or len(rows) > FEW_ROWS:
            weight = self.codes.float().mul_(self.scale[:, None])
            if self.zero is not None:
                weight.add_(self.zero[:, None])
            return F.linear(x, weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        sums = torch._weight_int8pack_mm(rows, self.codes, self.ones)
        return _scaled(sums, rows, self.scale, self.zero, self.bias).view(*x.shape[:-1], -1)


class Int4Linear(nn.Module):
    """A `QuantizedLinear` of 4 bits on bfloat16 inputs, like `Int8Linear`, for torch's 4-bit kernel.

    The kernel needs multiples of 16 rows, so the rest is padded. Its own scales are 1 and its zeros 0.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    groups: Tensor

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        self.rows = layer.rows
        padded = F.pad(unpack_bits(layer.codes, 4, layer.columns), (0, 0, 0, -layer.rows % 16))
        self.register_buffer("codes", torch.ops.aten._convert_weight_to_int4pack_for_cpu(padded.int(), 1))
        self.register_buffer("scale", layer.scale)
        self.register_buffer("zero", layer.zero + 8 * layer.scale)
        self.group = next(size for size in GROUPS if layer.columns % size == 0)
        groups = torch.zeros(layer.columns // self.group, len(padded), 2, dtype=torch.bfloat16)
        groups[..., 0] = 1
        self.register_buffer("groups", groups)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        sums = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.codes, self.group, self.groups)
        return _scaled(sums[:, : self.rows], rows, self.scale, self.zero, self.bias).view(*x.shape[:-1], -1)


def _scaled(sums: Tensor, x: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return scale * sums + zero * (sum of x) + bias, computed in float32, in x's type: (rows, out)."""
    if zero is None:
        out = sums.float().mul_(scale)
    else:
        out = torch.addcmul(x.float().sum(-1, keepdim=True) * zero, sums.float(), scale)
    return (out if bias is None else out.add_(bias)).to(x.dtype)
