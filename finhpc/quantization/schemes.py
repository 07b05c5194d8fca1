"""The quantization schemes by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from finhpc.quantization.bitsandbytes import int8_config, int8_tensors, nf4_config, nf4_fits, nf4_tensors
from finhpc.quantization.layers import minmax_tensors

MINMAX = "finhpc_minmax"  # the per-vector scheme's name in a model's config.json


@dataclass(frozen=True)
class Scheme:
    """How a scheme stores matrices on disk, and describes that in config.json.

    `tensors(matrix, bits, name)`: key after the module's name -> tensor, for a matrix (out, in).
    `config(bits, keep)`: the `quantization_config`, `keep` names the linear modules that stay in float.
    `fits(rows, columns)`: whether a matrix of that shape can be quantized.
    """

    bits: tuple[int, ...]
    embeddings: bool  # whether embeddings are quantized too
    tensors: Callable[[Tensor, int, str], dict[str, Tensor]]
    config: Callable[[int, list[str]], dict[str, object]]
    fits: Callable[[int, int], bool] = lambda rows, columns: True


def minmax_config(bits: int, keep: list[str]) -> dict[str, object]:
    return {"quant_method": MINMAX, "bits": bits}


SCHEMES: dict[str, Scheme] = {
    "minmax": Scheme((8, 4), True, minmax_tensors, minmax_config),
    "int8": Scheme((8,), False, int8_tensors, int8_config),
    "nf4": Scheme((4,), False, nf4_tensors, nf4_config, nf4_fits),
}
