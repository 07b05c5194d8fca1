"""The quantization schemes: `quantization.scheme` -> how matrices are stored in few bits.

A new one is a class derived from `finhpc.quantization.frozen.Scheme`, here or in a plugin (`finhpc.plugins`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from finhpc.errors import ConfigError
from finhpc.plugins import Registry
from finhpc.quantization.bitsandbytes import Int8, Nf4
from finhpc.quantization.frozen import FrozenFloat, FrozenLinear, Scheme
from finhpc.quantization.minmax import MinMax
from finhpc.settings.base import nearest

AUTO = {16: "none", 8: "int8", 4: "nf4"}  # the scheme of finetuning for each number of bits


def _check_scheme(name: str, scheme: Any) -> None:
    """Raise `ConfigError` for a scheme whose layers are not near the matrix that it was given."""
    if not isinstance(scheme, Scheme) or not set(scheme.bits) <= {8, 4}:
        raise ConfigError(
            f"quantization.scheme={name} must be an instance of a class derived from "
            "finhpc.quantization.frozen.Scheme, with bits=(8,), (4,) or (8, 4)."
        )
    matrix = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    for bits in scheme.bits:
        layer = scheme.frozen(scheme.tensors(matrix, bits, "layer"), (64, 64), None, bits)
        difference = float((layer.matrix(torch.float32) - matrix).norm() / matrix.norm())
        if not difference < 0.5:
            raise ConfigError(
                f"quantization.scheme={name} is wrong: at {bits} bits the matrix of its frozen layer is "
                f"{difference:.0%} away from the one that it quantized; correct its tensors or frozen."
            )


SCHEMES: Registry[Scheme] = Registry(
    "quantization.scheme", {"minmax": MinMax(), "int8": Int8(), "nf4": Nf4()}, _check_scheme
)


def check_scheme(bits: int, scheme: str) -> None:
    """Raise `ConfigError` if a scheme is unknown or does not have those bits."""
    if scheme not in SCHEMES:
        raise ConfigError(
            f"quantization.scheme={scheme} is unknown; {nearest(scheme, list(SCHEMES))} One of your own comes from "
            "--plugins MODULE."
        )
    has = SCHEMES[scheme].bits
    if bits == 16 or bits in has:
        return
    words = " or ".join(map(str, has))
    fits = ", ".join(name for name, other in SCHEMES.items() if bits in other.bits)
    raise ConfigError(
        f"quantization.scheme={scheme} has {words} bits, not quantization.bits={bits}; use quantization.bits={words}, "
        f"or a scheme of {bits} bits: {fits}."
    )


def is_quantized(shape: tuple[int, int], bits: int, scheme: str) -> bool:
    """Return whether `freeze` quantizes a matrix of this shape: NF4 needs sides that are multiples of 32."""
    return bits < 16 and SCHEMES[scheme].fits(*shape)


def freeze(rows: Tensor, bias: Tensor | None, bits: int, scheme: str, dtype: torch.dtype, name: str) -> FrozenLinear:
    """Build the frozen layer of a matrix (out, in). `dtype`: of a matrix that is not quantized.

    Raises `ConfigError` naming `name` if the scheme cannot represent it, `NonFiniteError` if it has NaN.
    """
    shape = (rows.shape[0], rows.shape[1])
    if not is_quantized(shape, bits, scheme):
        return FrozenFloat(rows.to(dtype), bias)
    return SCHEMES[scheme].frozen(SCHEMES[scheme].tensors(rows, bits, name), shape, bias, bits)
