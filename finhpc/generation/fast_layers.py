"""Replace layers by ones that are faster when few tokens are computed at a time.

Decoding reads every weight once per token, so bytes decide: B (A x) stays if the factors have fewer bytes than B A,
otherwise B A is multiplied out; quantized rows go to kernels that multiply codes, and are never turned into floats;
other weights are brought into oneDNN's layout once, because torch's product does that in every call.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from finhpc.lowrank.layers import LowRankLinear
from finhpc.lowrank.sltrain import SparseLinear
from finhpc.models.constant import can_be_packed, pack, product
from finhpc.quantization.minmax import QuantizedLinear
from finhpc.quantization.per_vector import unpack_bits

CALL_WEIGHTS = 40_000  # weights that can be read in the time of one more call; measured: 4 us at 20 GB/s, bf16
FEW_ROWS = 128  # beyond it, dequantizing 8-bit rows once is cheaper than torch's kernel for few rows
ALIGNMENT = 64  # bytes, as torch allocates
BYTE_COLUMNS = 16  # torch 2.13's 8-bit kernel reads so many at once, beyond the end of rows of other lengths
OFFSET = 128  # from uint8 codes to int8
GROUPS = (256, 128, 64, 32)  # columns that share a scale in torch's 4-bit kernel


def use_fast_layers(model: nn.Module) -> dict[str, int]:
    """Replace layers of `model` by faster ones; returns how many of each kind: merged, kernel_8, kernel_4, packed.

    A new layer takes over the tensors of the old one, so memory does not grow, except by a head that is packed and is
    the embedding, too; `model` must not be saved afterwards.
    """
    counts = {"merged": 0, "kernel_8": 0, "kernel_4": 0, "packed": 0}
    for name, module in list(model.named_modules()):
        fast: Any = None
        if isinstance(module, LowRankLinear) and module.mergeable and _merged_is_smaller(module):
            fast, kind = _merged(module), "merged"
        elif isinstance(module, QuantizedLinear) and module.probe.dtype == torch.bfloat16 and not module.weight.is_cuda:
            if module.columns % (BYTE_COLUMNS if module.bits == 8 else GROUPS[-1]) == 0:
                fast, kind = KernelLinear.of_minmax(module), f"kernel_{module.bits}"
        # by name: bitsandbytes is imported only if a model needs it
        elif type(module).__name__ == "Linear8bitLt" and module.in_features % BYTE_COLUMNS == 0:
            fast, kind = KernelLinear.of_bitsandbytes(module), "kernel_8"
        if fast is not None:
            model.set_submodule(name, fast)
            counts[kind] += 1
    for name, module in list(model.named_modules()):
        if type(module) in (nn.Linear, Conv1D) and name and can_be_packed(module.weight):
            model.set_submodule(name, PackedLinear(module))
            counts["packed"] += 1
    return counts


def _merged_is_smaller(layer: LowRankLinear) -> bool:
    if isinstance(layer, SparseLinear):  # it makes the same matrix for every product
        return True
    if type(layer.A) is not nn.Linear:  # quantized
        return False
    return layer.A.weight.numel() + layer.B.weight.numel() + CALL_WEIGHTS >= layer.in_features * layer.out_features


def _merged(layer: LowRankLinear) -> nn.Linear:
    a, *rest = (layer.A.weight, layer.B.weight, *([layer.S] if isinstance(layer, SparseLinear) else []))
    with torch.device("meta"):
        merged = nn.Linear(layer.in_features, layer.out_features, bias=False)
    with torch.no_grad():
        rows = layer.product(a.float(), *(tensor.float() for tensor in rest))
    merged.weight = nn.Parameter(rows.to(a.dtype), requires_grad=False)
    merged.bias = layer.B.bias
    return merged


class PackedLinear(nn.Module):
    """y = W x + bias, see `finhpc.models.constant`."""

    packed: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear | Conv1D) -> None:
        super().__init__()
        weight = layer.weight.detach()
        self.register_buffer("packed", pack(weight.T.contiguous() if isinstance(layer, Conv1D) else weight))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.packed, self.bias)


class KernelLinear(nn.Module):
    """y = (scale * codes + zero) x + bias by torch's kernels that multiply codes of 8 or 4 bits; zero may be None.

    Scale and zero follow the kernel, in float32: its own scales are 1 and its zeros 0. The 4-bit kernel packs the codes
    (out, in) in its own layout, with rows padded to a multiple of 16, and takes only bfloat16.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    ones: Tensor

    def __init__(self, bits: int, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None) -> None:
        super().__init__()
        self.bits, self.rows = bits, len(codes)
        ones = torch.ones_like(scale, dtype=torch.bfloat16)
        if bits == 4:
            columns = codes.shape[1]
            padded = F.pad(codes, (0, 0, 0, -self.rows % 16))
            codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(padded.int(), 1)
            self.group = next(size for size in GROUPS if columns % size == 0)
            ones = torch.zeros(columns // self.group, len(padded), 2, dtype=torch.bfloat16)  # scale and zero
            ones[..., 0] = 1
        elif codes.data_ptr() % ALIGNMENT:  # mapped from a file; torch 2.13's kernel crashes from 5 rows on
            codes = codes.clone()
        for name, tensor in {"codes": codes, "scale": scale, "zero": zero, "ones": ones}.items():
            self.register_buffer(name, tensor)
        self.bias = bias

    @classmethod
    def of_minmax(cls, layer: QuantizedLinear) -> KernelLinear:
        """Take over a `QuantizedLinear`; codes of 8 bits stay in the same memory."""
        if layer.bits == 4:
            codes = unpack_bits(layer.codes, 4, layer.columns)
            return cls(4, codes, layer.scale, layer.zero + 8 * layer.scale, layer.bias)
        codes = layer.codes.bitwise_xor_(OFFSET).view(torch.int8)
        return cls(8, codes, layer.scale, layer.zero + OFFSET * layer.scale, layer.bias)

    @classmethod
    def of_bitsandbytes(cls, layer: Any) -> KernelLinear:
        """Take over bitsandbytes' `Linear8bitLt`, which itself also rounds inputs, depending on the whole batch."""
        codes, largest = layer.weight.data, layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
        return cls(8, codes, largest.float() / 127, None, layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if self.bits == 8 and (x.dtype != torch.bfloat16 or x.is_cuda or len(rows) > FEW_ROWS):
            weight = self.codes.float().mul_(self.scale[:, None])
            if self.zero is not None:
                weight.add_(self.zero[:, None])
            return F.linear(x, weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        if self.bits == 8:
            sums = torch._weight_int8pack_mm(rows, self.codes, self.ones)
        else:
            rows = rows.contiguous()
            sums = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.codes, self.group, self.ones)[:, : self.rows]
        if self.zero is None:
            out = sums.float().mul_(self.scale)
        else:
            out = torch.addcmul(rows.float().sum(-1, keepdim=True) * self.zero, sums.float(), self.scale)
        out = out if self.bias is None else out.add_(self.bias)
        return out.to(x.dtype).view(*x.shape[:-1], -1)
