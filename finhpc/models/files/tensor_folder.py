"""A folder of safetensors in Hugging Face's layout, read and written one tensor at a time.

FOLDER/model.safetensors                           all tensors, or
FOLDER/model-00001-of-00003.safetensors, ...       some of them each, and
FOLDER/model.safetensors.index.json                name -> file
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from finhpc.errors import CheckpointError
from finhpc.files import partial_file, publish

FILE_BYTES = 1 << 30  # a file is written when its tensors take this much, which bounds the memory needed
ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
STORED_FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors names them


class TensorFolder:
    """Reads tensors by name. A file is open only while one tensor is read from it.

    The tensors are those of `model.safetensors`, or of the files in the index; other files are ignored. Raises
    `CheckpointError` if files are missing, damaged, or contradict the index.
    """

    def __init__(self, folder: Path, config: Any = None) -> None:
        self.config = config
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.quantized: dict[str, str] = {}  # name -> type of every tensor that is not in floats
        self._files: dict[str, Path] = {}
        index = _read_index(folder)
        for part in sorted(set(index.values())) if index else [_single_file(folder)]:
            file = folder / part
            with _open(file) as opened:
                for name in opened.keys():  # noqa: SIM118 - not a dictionary
                    if index and index.get(name) != part:
                        place = f"into {index[name]}" if name in index else "nowhere"
                        raise CheckpointError(
                            f"{file} holds {name}, which {INDEX} puts {place}; write the model again."
                        )
                    view = opened.get_slice(name)
                    self.shapes[name] = tuple(view.get_shape())
                    if view.get_dtype() not in STORED_FLOATS:
                        self.quantized[name] = view.get_dtype()
                    self._files[name] = file
        absent = [f"{name} ({file})" for name, file in (index or {}).items() if name not in self.shapes]
        if absent:
            raise CheckpointError(
                f"{folder}/{INDEX} names {', '.join(absent[:5])}, and no such tensor is there; fetch the model again."
            )

    def read(self, name: str) -> Tensor:
        with _open(self._files[name]) as opened:
            tensor: Tensor = opened.get_tensor(name)
        return tensor


def _read_index(folder: Path) -> dict[str, str] | None:
    """Return tensor name -> file name from the index; None if there is no index."""
    if not (folder / INDEX).is_file():
        return None
    try:
        index: dict[str, str] = json.loads((folder / INDEX).read_bytes())["weight_map"]
        names = sorted(set(index.values()))
        if not all(isinstance(name, str) for name in names):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{folder / INDEX} is cut short or damaged; fetch it again.") from None
    absent = [name for name in names if not (folder / name).is_file()]
    if absent and (folder / absent[0]).is_symlink():
        raise CheckpointError(_dangling(folder / absent[0]))
    if absent:
        raise CheckpointError(f"{folder} lacks {', '.join(absent)}, which its index names; fetch them.")
    if (folder / ONE).is_file() and ONE not in names:
        raise CheckpointError(
            f"{folder} holds both {ONE} and {INDEX}, which names other files; remove the one that is out of date."
        )
    return index


def _dangling(file: Path) -> str:
    return f"{file} is a link to {file.readlink()}, which is not there; fetch the model again."


def _single_file(folder: Path) -> str:
    if (folder / ONE).is_file():
        return ONE
    if (folder / ONE).is_symlink():
        raise CheckpointError(_dangling(folder / ONE))
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    if others:
        raise CheckpointError(
            f"{folder} has no {ONE} and no {INDEX}, only {', '.join(others[:5])}; rename the file of the whole model."
        )
    if pickles:
        raise CheckpointError(
            f"{folder} has no .safetensors file, only {', '.join(pickles[:5])}; pickled weights are not opened; "
            "convert them first (transformers: save_pretrained on a machine that you trust them on)."
        )
    raise CheckpointError(f"{folder} has no {ONE} and no index of several; give a model folder.")


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise CheckpointError(
            f"{file} is cut short, damaged or another format ({error}); fetch or write it again; "
            "pickles are never opened."
        ) from None


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write one safetensors file, which appears only when it is complete and on the disk."""
    with partial_file(path) as partial:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata=metadata)


class TensorFolderWriter:
    """Writes a folder that appears only when it is complete; with `over` it replaces an older one.

    A context manager: an exception in the block removes everything written. `add` tensors, `finish`, put other files
    into `partial`, then `publish`. Tensors are in memory until they take FILE_BYTES; with `in_parts` each `add` goes to
    the disk at once, and `finish` joins these parts into files of that size.
    """

    def __init__(self, out: Path, over: bool = False, in_parts: bool = False) -> None:
        self.out, self.over, self.partial = out, over, out.with_name(f".{out.name}.partial")
        self.in_parts = in_parts
        self.names: set[str] = set()
        self._pending: dict[str, Tensor] = {}
        self._files: list[list[str]] = []  # names of the tensors of each file
        self._bytes = self._total = 0

    def __enter__(self) -> TensorFolderWriter:
        shutil.rmtree(self.partial, ignore_errors=True)  # of a process that was killed
        self.partial.mkdir(parents=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, *args: object) -> None:
        if kind is not None:
            shutil.rmtree(self.partial, ignore_errors=True)

    def add(self, tensors: dict[str, Tensor]) -> None:
        self._pending |= {name: tensor.contiguous() for name, tensor in tensors.items()}
        self.names |= tensors.keys()
        self._bytes += sum(tensor.nbytes for tensor in tensors.values())
        if self._bytes >= FILE_BYTES or self.in_parts:
            self.flush()

    def flush(self) -> None:
        """Write the tensors added since the last file into a file of their own."""
        if not self._pending:
            return
        file = self.partial / f"{len(self._files)}.tmp"
        try:
            save_file(self._pending, file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise CheckpointError(f"{file} could not be written ({error}); make room on that disk.") from None
        self._files.append(list(self._pending))
        self._total += self._bytes
        self._pending, self._bytes = {}, 0

    def finish(self, config: Any = None) -> int:
        """Write the last file, the index and `config`, a model's config; return the bytes of all tensor files."""
        self.flush()
        parts = [self.partial / f"{i}.tmp" for i in range(len(self._files))]
        groups = _by_size(parts) if self.in_parts else [[part] for part in parts]
        index: dict[str, str] = {}
        names = iter(self._files)
        for i, group in enumerate(groups):
            name = ONE if len(groups) == 1 else f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
            _join(group, self.partial / name)
            for _ in group:
                index |= dict.fromkeys(next(names), name)
        if len(groups) > 1:
            tree = {"metadata": {"total_size": self._total}, "weight_map": index}
            (self.partial / INDEX).write_text(json.dumps(tree, indent=2))
        if config is not None:
            config.save_pretrained(self.partial)
        return sum(file.stat().st_size for file in self.partial.glob("*.safetensors"))

    def publish(self) -> None:
        """Move the folder to its place."""
        publish(self.partial, self.out, over=self.over)


def _by_size(parts: list[Path]) -> list[list[Path]]:
    """Return consecutive parts in groups of at most FILE_BYTES, or of one part."""
    groups: list[list[Path]] = [[]]
    size = 0
    for part in parts:
        if groups[-1] and size + part.stat().st_size > FILE_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(part)
        size += part.stat().st_size
    return groups


def _join(parts: list[Path], target: Path) -> None:
    """Make one safetensors file of several by copying bytes, and remove them.

    The format: 8 bytes with the length n of the header (little-endian), n bytes of JSON (name -> dtype, shape and
    offsets into what follows), and the bytes of the tensors.
    """
    if len(parts) == 1:
        parts[0].rename(target)
        return
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for part in parts:
        with open(part, "rb") as file:
            entries = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        entries.pop("__metadata__", None)
        for name, entry in entries.items():
            header[name] = entry | {"data_offsets": [begin + offset for offset in entry["data_offsets"]]}
        begin += max(entry["data_offsets"][1] for entry in entries.values())
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(target, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for part in parts:
            with open(part, "rb") as file:
                file.seek(8 + int.from_bytes(file.read(8), "little"))
                shutil.copyfileobj(file, out, 1 << 24)
            part.unlink()
