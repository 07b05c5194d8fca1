"""Products with weights that do not change, on a CPU: oneDNN's own layout, into which torch brings them in every call.

These are the kernels that torch's compiler calls for constant weights. Measured on a core of an AMD EPYC, W 1536 x 576,
against `F.linear`: 295 -> 159 us for 8 rows in bfloat16, 473 -> 274 us in float32; 508 -> 355 us and 985 -> 669 us for
32 rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PACKED = torch._mkldnn  # type: ignore[attr-defined]


def can_be_packed(weight: Tensor) -> bool:
    """Return whether oneDNN multiplies matrices of that type on this machine."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    has_bf16 = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32 or bool(has_bf16)


def pack(weight: Tensor) -> Tensor:
    """Return a copy of a weight (out, in) for `product`; the weight itself if it cannot be packed."""
    if not can_be_packed(weight):
        return weight
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return packed


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return W x + bias for x (..., in) and a weight of `pack`."""
    if weight.layout != PACKED:
        return F.linear(x, weight, bias)
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def filled(rows: int) -> int:
    """Return how many rows a product of so many has on a CPU, the last of which are for nothing.

    For every number of rows oneDNN makes and keeps code and buffers, of about a megabyte for each shape of weight.
    """
    if rows <= 8:
        return rows
    step = 4 if rows <= 64 else 32
    return -(-rows // step) * step
