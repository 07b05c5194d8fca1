"""A frozen base quantised once and kept on disk, for the many finetunings of a sweep that start from it.

A folder holds a safetensors file for each matrix that is quantised, named as the matrix is in the base, with what its
scheme makes of it (`finhpc.quantization.schemes`), and the sha256 of each. What stays in float is read from the base.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from finhpc.errors import CheckpointError
from finhpc.files import publish
from finhpc.models.files.manifest import check_manifest, write_manifest
from finhpc.quantization.schemes import SCHEMES

if TYPE_CHECKING:
    from finhpc.models.lora.model import LoraModel

log = logging.getLogger(__name__)

FILE = ".safetensors"


def write_quantized_cache(lora_model: LoraModel, folder: Path, advance: Callable[[int], None]) -> None:
    """Quantise the base of `lora_model` into `folder`, a matrix at a time; one that is there and whole stays.

    `advance` is told of each matrix. It is quantised on the CPU, whatever trains beside it later. Raises
    `NonFiniteError` or `ConfigError` naming a matrix that cannot be quantised.
    """
    if folder.is_dir():  # renamed there when it was complete
        try:
            check_manifest(folder)
            return
        except CheckpointError as error:
            log.info(f"{error}\nThe base is quantised again.")
            shutil.rmtree(folder)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    scheme, bits = SCHEMES[lora_model.scheme], lora_model.quantization.bits
    for matrix in lora_model.quantized_matrices():
        held = scheme.tensors(lora_model.rows(matrix), bits, matrix.name)
        save_file({key: value.contiguous() for key, value in held.items()}, partial / f"{matrix.name}{FILE}")
        advance(1)
    write_manifest(partial)
    publish(partial, folder)


def quantized_cache_bytes(lora_model: LoraModel) -> int:
    """Bytes of the codes that `write_quantized_cache` writes; scales come on top."""
    bits = lora_model.quantization.bits
    return sum(matrix.shape[0] * matrix.shape[1] * bits // 8 for matrix in lora_model.quantized_matrices())


def kept(folder: Path, name: str) -> dict[str, Tensor]:
    """What the scheme made of the matrix `name`. Raises `CheckpointError` where the folder does not hold it whole."""
    try:
        held: dict[str, Tensor] = load_file(folder / f"{name}{FILE}")
        return held
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} does not hold the quantised {name} whole ({error}); remove the folder and run again."
        ) from None
