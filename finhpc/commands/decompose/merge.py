"""Several safetensors files made into a model's, copied byte by byte, so that no tensor is held in memory.

The format: 8 bytes for the length n of the header (little-endian), n bytes of JSON (name -> dtype,
shape and offsets into what follows), and the tensors' bytes.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from finhpc.files import partial_file

FILE_BYTES = 5_000_000_000  # largest file of a model that is cut into several, as transformers cuts


def save_atomic(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file, complete or absent."""
    with partial_file(path) as partial:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata=metadata)


def header_of(path: Path) -> dict[str, Any]:
    """A safetensors file's header: name -> {dtype, shape, data_offsets}, and `__metadata__`."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    return header


def merge_model(parts: list[Path], folder: Path) -> set[str]:
    """Write `folder`/model.safetensors, or several files and their index, from parts; returns all names."""
    groups: list[list[Path]] = [[]]
    size = 0
    for part in parts:
        if groups[-1] and size + part.stat().st_size > FILE_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(part)
        size += part.stat().st_size
    index: dict[str, str] = {}
    total = 0
    for i, group in enumerate(groups):
        name = "model.safetensors" if len(groups) == 1 else f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
        names, written = _merge(group, folder / name)
        index |= dict.fromkeys(names, name)
        total += written
    if len(groups) > 1:
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
        (folder / "model.safetensors.index.json").write_text(text)
    return set(index)


def _merge(parts: list[Path], target: Path) -> tuple[list[str], int]:
    """Write one file of all tensors of some; returns their names and bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for part in parts:
        end = begin
        for name, entry in header_of(part).items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                header[name] = entry | {"data_offsets": [begin + first, begin + last]}
                end = max(end, begin + last)
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(target, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for part in parts:
            with open(part, "rb") as file:
                file.seek(8 + int.from_bytes(file.read(8), "little"))
                shutil.copyfileobj(file, out, 1 << 24)
        out.flush()
        os.fsync(out.fileno())
    return [name for name in header if name != "__metadata__"], begin
