"""Model folders in Hugging Face's layout, a tensor at a time: one is read, one is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from finhpc.errors import CheckpointError, ConfigError
from finhpc.files import publish

FILE_BYTES = 1 << 30  # a file of weights is written when it has grown beyond this: what is held in memory
ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
TOKENIZERS = ("tokenizer.json", "vocab.json", "tokenizer.model")  # one of them makes a tokenizer
TOKENIZER_FILES = (
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
    *("spiece.model", "additional_chat_templates/*"),
)
GENERATION = "generation_config.json"
STORED_FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors names them


class SafetensorsFolder:
    """The safetensors of a Hugging Face folder. A file is open only while one tensor is read from it.

    The weights are `model.safetensors` alone, or what the index names; other files are not weights of the model.
    Raises `CheckpointError` where files are missing, damaged, or contradict the index.
    """

    def __init__(self, folder: Path, config: Any) -> None:
        self.config = config
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.quantized: dict[str, str] = {}  # name -> type of every tensor that is not in floats
        self._files: dict[str, Path] = {}
        index = _index(folder)
        for part in sorted(set(index.values())) if index else [_single(folder)]:
            file = folder / part
            with _open(file) as opened:
                for name in opened.keys():  # noqa: SIM118 - no dictionary
                    if index and index.get(name) != part:
                        raise CheckpointError(
                            f"{file} holds {name}, which {INDEX} puts {_where(index.get(name))}; write the model again."
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


def _where(file: str | None) -> str:
    return f"into {file}" if file else "nowhere"


def _index(folder: Path) -> dict[str, str] | None:
    """Name of each tensor -> its file, as the index says; None if there is no index."""
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


def _single(folder: Path) -> str:
    if (folder / ONE).is_file():
        return ONE
    if (folder / ONE).is_symlink():
        raise CheckpointError(_dangling(folder / ONE))
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    if others:
        raise CheckpointError(
            f"{folder} holds no {ONE} and no {INDEX}, only {', '.join(others[:5])}; rename the file of the whole model."
        )
    if pickles:
        raise CheckpointError(
            f"{folder} holds no .safetensors file, only {', '.join(pickles[:5])}; pickled weights are not opened; "
            "convert them first (transformers: save_pretrained on a machine that you trust them on)."
        )
    raise CheckpointError(f"{folder} holds no {ONE} and no index of several; give a model folder.")


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise CheckpointError(
            f"{file} is cut short, damaged or another format ({error}); fetch or write it again; "
            "pickles are never opened."
        ) from None


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZERS)


def copy_tokenizer(source: Path, out: Path) -> bool:
    """Copy a folder's tokenizer, all its files or none, and chat templates; returns whether there is one."""
    if not has_tokenizer(source):
        return False
    for pattern in TOKENIZER_FILES:
        for file in source.glob(pattern):
            if file.is_file():
                (out / file.relative_to(source)).parent.mkdir(exist_ok=True)
                shutil.copyfile(file, out / file.relative_to(source))
    return True


class FolderWriter:
    """Writes a model folder that is there when it is complete, and not before.

    A context manager: what was written is removed where the block ends with an exception. `add`
    tensors, then `finish`.
    """

    def __init__(self, out: Path) -> None:
        self.out, self.partial = out, out.with_name(f".{out.name}.partial")
        self._held: dict[str, Tensor] = {}
        self._files: list[list[str]] = []  # names of the tensors of each file
        self._bytes = self._total = 0

    def __enter__(self) -> FolderWriter:
        try:
            shutil.rmtree(self.partial, ignore_errors=True)  # of an export that was killed
            self.partial.mkdir(parents=True)
        except OSError as error:
            raise ConfigError(f"out={self.out} cannot be written ({error.strerror}); choose another --out.") from None
        return self

    def __exit__(self, kind: type[BaseException] | None, *args: object) -> None:
        if kind is not None:
            shutil.rmtree(self.partial, ignore_errors=True)

    def add(self, tensors: dict[str, Tensor]) -> None:
        self._held |= {name: tensor.contiguous() for name, tensor in tensors.items()}
        self._bytes += sum(_bytes(tensor) for tensor in tensors.values())
        if self._bytes >= FILE_BYTES:
            self._flush()

    def finish(self, config: Any) -> int:
        """Write the index and config.json; returns the weights' bytes.

        Everything else that belongs into the folder may be written to `partial` before; `publish` then
        puts it in its place.
        """
        self._flush()
        index: dict[str, str] = {}
        for i, names in enumerate(self._files):
            several = f"model-{i + 1:05d}-of-{len(self._files):05d}.safetensors"
            name = "model.safetensors" if len(self._files) == 1 else several
            (self.partial / f"{i}.tmp").rename(self.partial / name)
            index |= dict.fromkeys(names, name)
        if len(self._files) > 1:
            text = json.dumps({"metadata": {"total_size": self._total}, "weight_map": index}, indent=2)
            (self.partial / "model.safetensors.index.json").write_text(text)
        config.save_pretrained(self.partial)
        return sum(file.stat().st_size for file in self.partial.glob("*.safetensors"))

    def publish(self) -> None:
        try:
            publish(self.partial, self.out)
        except OSError as error:  # something came into being there meanwhile
            raise ConfigError(f"out={self.out} cannot be replaced ({error.strerror}); choose another --out.") from None

    def _flush(self) -> None:
        if not self._held:
            return
        file = self.partial / f"{len(self._files)}.tmp"
        try:
            save_file(self._held, file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise CheckpointError(f"{file} could not be written ({error}); make room on that disk.") from None
        self._files.append(list(self._held))
        self._total += self._bytes
        self._held, self._bytes = {}, 0


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
