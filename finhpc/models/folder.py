"""Model folders in Hugging Face's layout, a tensor at a time: one is read, one is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from finhpc.errors import CheckpointError, ConfigError
from finhpc.files import publish

FILE_BYTES = 1 << 30  # a file of weights is written when it has grown beyond this: what is held in memory
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
TOKENIZER_FILES = (
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
    *("spiece.model", "generation_config.json"),
)


class FolderReader:
    """The tensors of a model folder, each read when it is asked for.

    Raises `ConfigError` where the folder is no model or a pickled one, `CheckpointError` where a file
    is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / "config.json").is_file():
            raise ConfigError(f"model={folder} has no config.json; give a model folder (a run's `model` folder).")
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            pickles = [file.name for pattern in PICKLES for file in folder.glob(pattern)]
            found = f"only pickled weights ({', '.join(pickles)}), which are never opened" if pickles else "no weights"
            raise ConfigError(f"model={folder} holds {found}; save the model as safetensors first.")
        self._file: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            with self._open(file) as opened:
                for name in opened.keys():  # noqa: SIM118
                    self._file[name] = file
                    self.shapes[name] = tuple(opened.get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        with self._open(self._file[name]) as opened:
            tensor: Tensor = opened.get_tensor(name)
            return tensor

    @contextmanager
    def _open(self, file: Path) -> Iterator[Any]:
        try:
            with safe_open(file, framework="pt") as opened:
                yield opened
        except SafetensorError as error:
            raise CheckpointError(
                f"{file} is cut short, damaged or another format ({error}); restore it from a copy. "
                "Pickles are never opened."
            ) from None


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

    def finish(self, config: Any, tokenizer: Path) -> int:
        """Write the index, config.json and the tokeniser's files of the folder `tokenizer`; returns the weights' bytes.

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
        for file in sorted({file for pattern in TOKENIZER_FILES for file in tokenizer.glob(pattern)}):
            shutil.copyfile(file, self.partial / file.name)
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
