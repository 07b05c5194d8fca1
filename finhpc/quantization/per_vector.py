"""The paper's per-vector quantiser: each row of a matrix on its own evenly spaced grid.

FinGPT-HPC, section V.B: the scale of a vector is the difference of its maximum and minimum. A vector
is one output row of W, or one row of an embedding. Code q stands for q * scale + zero, where `zero`
is the row's minimum and `scale` its range over 2^bits - 1 steps, so the minimum and the maximum are
kept and every other element is at most scale / 2 away (and the rounding of float32).

Scale and zero are float32. They take 8 bytes a row: 1.2 % of GPT2-1.5B at rank 384 in 8 bits. In
float16 the error of the scale itself, times 255 steps, would reach an eighth of a step at 8 bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from finhpc.errors import NonFiniteError

BITS = (8, 4)


class Vectors(NamedTuple):
    """A quantised matrix: `codes` uint8 (rows, columns), `scale` and `zero` float32 (rows,)."""

    codes: Tensor
    scale: Tensor
    zero: Tensor


def quantize(weight: Tensor, bits: int, name: str = "weight") -> Vectors:
    """Quantise each row of `weight` (rows, columns), of any float type, to 8 or 4 bits.

    Raises `NonFiniteError` naming `name` and the first row that holds NaN or infinity, or whose range
    float32 cannot hold.
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
    """The float32 matrix (rows, columns) that the codes stand for."""
    return _values(vectors.codes.float(), vectors.scale, vectors.zero)


def rounded(weight: Tensor, bits: int) -> Tensor:
    """`dequantize(quantize(weight, bits))`, bit for bit, of a float32 matrix; NaN where a row is not finite."""
    return _values(*_steps(weight, bits))


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (..., columns) as stored: 8 bits as they are, 4 bits two to a byte, (..., ceil(columns / 2)).

    The first of two is in the low half; an odd last column leaves the high half of its byte 0.
    """
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """What `pack` took: uint8 codes (..., columns)."""
    if bits == 8:
        return packed
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)[..., :columns]


def packed_columns(columns: int, bits: int) -> int:
    """Bytes of a packed row."""
    return columns if bits == 8 else (columns + 1) // 2


def _steps(weight: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest step of each element (as float32), and each row's scale and zero."""
    last = 2**bits - 1
    low, high = weight.aminmax(dim=1)
    scale = (high - low) / torch.full_like(low, last)  # a GPU multiplies by a plain number's reciprocal: rounded twice
    divisor = torch.where(scale == 0, 1.0, scale)  # a constant row: all its codes are 0
    steps = ((weight - low[:, None]) / divisor[:, None]).round_().clamp_(0, last)
    return steps, scale, low


def _values(steps: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    # Two roundings, product then sum, wherever this runs: what training computes is what an export holds.
    return steps.mul(scale[..., None]).add_(zero[..., None])
