"""The paper's per-vector quantizer: each row of a matrix on its own evenly spaced grid.

FinGPT-HPC, section V.B: the scale of a vector is the difference of its maximum and minimum. A vector
is one output row of W, or one row of an embedding. Code q stands for q * scale + zero, where `zero`
is the row's minimum and `scale` its range over 2^bits - 1 steps, so the minimum and the maximum are
kept and every other element is at most scale / 2 away (and the rounding of float32).

Scale and zero are float32. They take 8 bytes per row: 1.2 % of GPT2-1.5B at rank 384 in 8 bits. In
float16 the error of the scale itself, times 255 steps, would reach an eighth of a step at 8 bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from finhpc.errors import NonFiniteError

BITS = (8, 4)


class Vectors(NamedTuple):
    """A quantized matrix: `codes` uint8 (rows, columns), `scale` and `zero` float32 (rows,)."""

    codes: Tensor
    scale: Tensor
    zero: Tensor


def quantize(weight: Tensor, bits: int, name: str = "weight") -> Vectors:
    """Quantize each row of `weight` (rows, columns), of any float type, to 8 or 4 bits.

    Raises `NonFiniteError` naming `name` and the first row that has NaN or infinity, or a range beyond
    float32.
    """
    steps, scale, zero = _steps(weight.float(), bits)
    bad = ~torch.isfinite(scale)  # NaN and infinity pass through minimum and maximum
    if bad.any():
        raise NonFiniteError(
            f"{name} holds NaN or infinity, or numbers too far apart for float32, in {int(bad.sum())} of its "
            f"{len(bad)} rows; the first is row {int(bad.int().argmax())}."
        )
    return Vectors(steps.to(torch.uint8), scale, zero)


def dequantize(vectors: Vectors) -> Tensor:
    """Return the float32 matrix (rows, columns) that the codes represent."""
    return _values(vectors.codes.float(), vectors.scale, vectors.zero)


def rounded(weight: Tensor, bits: int) -> Tensor:
    """Return `dequantize(quantize(weight, bits))`, bit for bit, of a float32 matrix; a non-finite row becomes NaN."""
    return _values(*_steps(weight, bits))


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack codes (..., columns) for storage: 8 bits as they are, 4 bits two per byte, (..., ceil(columns / 2)).

    The first of two is in the low half; after an odd last column the high half of the byte is 0.
    """
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def unpack_bits(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Undo `pack_bits`: return uint8 codes (..., columns)."""
    if bits == 8:
        return packed
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)[..., :columns]


def packed_columns(columns: int, bits: int) -> int:
    """Return the bytes of a packed row."""
    return columns if bits == 8 else (columns + 1) // 2


def _steps(weight: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the nearest step of each element (as float32), and each row's scale and zero."""
    last = 2**bits - 1
    low, high = weight.aminmax(dim=1)
    scale = (high - low) / torch.full_like(low, last)  # a GPU multiplies by a plain number's reciprocal: rounded twice
    divisor = torch.where(scale == 0, 1.0, scale)  # a constant row: all its codes are 0
    steps = ((weight - low[:, None]) / divisor[:, None]).round_().clamp_(0, last)
    return steps, scale, low


def _values(steps: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    # Two roundings, product then sum, on every device: training computes exactly what an export stores.
    return steps.mul(scale[..., None]).add_(zero[..., None])
