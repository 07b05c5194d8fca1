"""A frozen base quantized once and stored on disk, for the many finetunings of a sweep that start from it.

The folder has, for each quantized matrix, the tensors of its scheme (`finhpc.quantization.schemes`) as `MATRIX.KEY`,
and a manifest of sha256. Unquantized weights are read from the base.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from finhpc.errors import CheckpointError
from finhpc.models.files.manifest import check_manifest, write_manifest
from finhpc.models.files.tensor_folder import TensorFolder, TensorFolderWriter
from finhpc.quantization.schemes import SCHEMES

if TYPE_CHECKING:
    from finhpc.models.lora.model import LoraModel

log = logging.getLogger(__name__)


def write_quantized_cache(lora_model: LoraModel, folder: Path, advance: Callable[[int], None]) -> None:
    """Quantize the base of `lora_model` into `folder`, a matrix at a time, unless it is there and undamaged.

    `advance(1)` is called after each matrix. Quantization runs on the CPU, whatever device trains later. Raises
    `NonFiniteError` or `ConfigError` naming a matrix that cannot be quantized.
    """
    if folder.is_dir():  # it appeared there only when complete
        try:
            check_manifest(folder)
            return
        except CheckpointError as error:
            log.info(f"{error}\nThe base is quantized again.")
            shutil.rmtree(folder)
    scheme, bits = SCHEMES[lora_model.scheme], lora_model.quantization.bits
    with TensorFolderWriter(folder, in_parts=True) as writer:
        for matrix in lora_model.quantized_matrices():
            tensors = scheme.tensors(lora_model.rows(matrix), bits, matrix.name)
            writer.add({f"{matrix.name}.{key}": tensor for key, tensor in tensors.items()})
            advance(1)
        writer.finish()
        write_manifest(writer.partial)
        writer.publish()


def quantized_cache_bytes(lora_model: LoraModel) -> int:
    """Return the bytes of the codes that `write_quantized_cache` writes; scales take more."""
    bits = lora_model.quantization.bits
    return sum(matrix.shape[0] * matrix.shape[1] * bits // 8 for matrix in lora_model.quantized_matrices())


class QuantizedCache:
    """Reads what `write_quantized_cache` wrote; raises `CheckpointError` if the folder is not complete."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        try:
            self._folder = TensorFolder(folder)
        except (OSError, CheckpointError) as error:
            raise CheckpointError(f"{error} It is a cache: remove the folder {folder} and run again.") from None

    def read(self, name: str) -> dict[str, Tensor]:
        """Return the scheme's tensors of the matrix `name`, by key."""
        prefix = f"{name}."
        stored = [full for full in self._folder.shapes if full.startswith(prefix)]
        if not stored:
            raise CheckpointError(f"{self.path} has no quantized {name}; remove the folder and run again.")
        return {full.removeprefix(prefix): self._folder.read(full) for full in stored}
