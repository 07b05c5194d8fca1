"""The form of each layer that is fastest when few tokens are computed at a time.

Decoding reads every weight once a token, so bytes decide: B (A x) stays where the factors have fewer than
B A, else B A is multiplied out; packed rows are multiplied as they lie, never turned into floats.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finhpc.lowrank.layers import LowRankLinear
from finhpc.quantization.layers import QuantizedLinear
from finhpc.quantization.per_vector import unpack

CALL_WEIGHTS = 40_000  # what one more call costs in the time of reading weights; measured: 4 us at 20 GB/s, bf16
FEW_ROWS = 128  # beyond it, turning 8-bit rows into floats once is cheaper than torch's kernel for few rows
ALIGNMENT = 64  # bytes, as torch allocates
BYTE_COLUMNS = 16  # torch 2.13's 8-bit kernel reads as many at once, and beyond the end of other rows
OFFSET = 128  # uint8 codes as int8
GROUPS = (256, 128, 64, 32)  # columns that share a scale in torch's 4-bit kernel


def use_fast_layers(model: nn.Module) -> dict[str, int]:
    """Put the fastest form of each layer in its place; how many of each kind were: merged, kernel_8, kernel_4.

    A layer takes over the tensors of the one before it, so memory does not grow; `model` is no longer to be saved.
    """
    counts = {"merged": 0, "kernel_8": 0, "kernel_4": 0}
    for name, module in list(model.named_modules()):
        made: Any = None
        if isinstance(module, LowRankLinear) and module.mergeable and _merged_is_smaller(module):
            made, kind = _merged(module), "merged"
        elif isinstance(module, QuantizedLinear) and module.like.dtype == torch.bfloat16 and not module.weight.is_cuda:
            kind = f"kernel_{module.bits}"
            if module.bits == 8 and module.columns % BYTE_COLUMNS == 0:
                made = Int8Linear.of_packed(module)
            elif module.bits == 4 and module.columns % GROUPS[-1] == 0:
                made = Int4Linear(module)
        # bitsandbytes is imported where a model needs it
        elif type(module).__name__ == "Linear8bitLt" and module.in_features % BYTE_COLUMNS == 0:
            made, kind = Int8Linear.of_int8(module), "kernel_8"
        if made is not None:
            model.set_submodule(name, made)
            counts[kind] += 1
    return counts


def _merged_is_smaller(layer: LowRankLinear) -> bool:
    dense = layer.in_features * layer.out_features
    return layer.rank * (layer.in_features + layer.out_features) + CALL_WEIGHTS >= dense


def _merged(layer: LowRankLinear) -> nn.Linear:
    a, b = (factor.detach() for factor in layer.pair())
    with torch.device("meta"):
        made = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    made.weight = nn.Parameter(layer.product(a.float(), b.float()).to(a.dtype), requires_grad=False)
    if layer.bias is not None:
        made.bias = layer.bias
    return made


class Int8Linear(nn.Module):
    """y = (scale * codes + zero) x + bias, with int8 codes (out, in) that stay as they are; zero may be None.

    bfloat16 inputs go through torch's kernel, which sums codes; scale and zero follow in float32.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    ones: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None) -> None:
        super().__init__()
        # Codes that lie as in a file may begin anywhere; from 5 rows on torch 2.13's kernel then ends the process.
        self.register_buffer("codes", codes.clone() if codes.data_ptr() % ALIGNMENT else codes)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)
        self.register_buffer("ones", torch.ones_like(scale, dtype=torch.bfloat16))
        self.bias = bias

    @classmethod
    def of_packed(cls, layer: QuantizedLinear) -> Int8Linear:
        """Of a layer of 8 bits, its codes OFFSET lower, in the same memory."""
        codes = layer.packed.bitwise_xor_(OFFSET).view(torch.int8)
        return cls(codes, layer.scale, layer.zero + OFFSET * layer.scale, layer.bias)

    @classmethod
    def of_int8(cls, layer: Any) -> Int8Linear:
        """Of bitsandbytes' `Linear8bitLt`, which also rounds its inputs, one row differently beside others."""
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
    """A `QuantizedLinear` of 4 bits on bfloat16 inputs; as `Int8Linear`, with codes as torch's 4-bit kernel packs them.

    The kernel takes multiples of 16 rows: the rest is filled up. Its own scales are 1 and its zeros 0.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    groups: Tensor

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        self.rows = layer.rows
        filled = F.pad(unpack(layer.packed, 4, layer.columns), (0, 0, 0, -layer.rows % 16))
        self.register_buffer("codes", torch.ops.aten._convert_weight_to_int4pack_for_cpu(filled.int(), 1))
        self.register_buffer("scale", layer.scale)
        self.register_buffer("zero", layer.zero + 8 * layer.scale)
        self.group = next(size for size in GROUPS if layer.columns % size == 0)
        groups = torch.zeros(layer.columns // self.group, len(filled), 2, dtype=torch.bfloat16)
        groups[..., 0] = 1
        self.register_buffer("groups", groups)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        sums = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.codes, self.group, self.groups)
        return _scaled(sums[:, : self.rows], rows, self.scale, self.zero, self.bias).view(*x.shape[:-1], -1)


def _scaled(sums: Tensor, x: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None) -> Tensor:
    """scale * sums + zero * (sum of x) + bias, in float32, then in x's type: (rows, out)."""
    if zero is None:
        out = sums.float().mul_(scale)
    else:
        out = torch.addcmul(x.float().sum(-1, keepdim=True) * zero, sums.float(), scale)
    return (out if bias is None else out.add_(bias)).to(x.dtype)
