"""A model that a command is given: a Hugging Face folder, a hub id, or a GGUF file."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from finhpc.errors import CheckpointError, ConfigError
from finhpc.models.files.config import read_config
from finhpc.models.files.gguf import GgufFile
from finhpc.models.files.tokenizer import has_tokenizer, open_tokenizer, save_tokenizer
from finhpc.models.files.weights import Weights, open_folder

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
FETCHED = ["*.json", "*.safetensors", "merges.txt", "tokenizer.model", "chat_template.jinja"]
# The same weights in their maker's own layout, which Mistral's and Meta's folders have too.
NOT_FETCHED = ["consolidated*", "original/*"]


def locate(model: str, revision: str | None = None) -> Path:
    """Return the folder or file of `model`, fetched from the hub (at `revision`) if it is a hub id.

    Raises `ConfigError` if there is no such model, `CheckpointError` if the hub does not answer.
    """
    if not model:
        raise ConfigError("model is not set; give --model with a Hugging Face folder, a hub id or a .gguf file.")
    path = Path(model).expanduser()
    if path.exists():
        return path.absolute()
    if not HUB_ID.fullmatch(model) or model.endswith((".gguf", ".safetensors")):
        raise ConfigError(f"model={model} does not exist; give a Hugging Face folder, a hub id or a .gguf file.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=FETCHED, ignore_patterns=NOT_FETCHED))
    except Exception as error:  # the hub's client raises many kinds of errors, some from other packages
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise CheckpointError(
            f"model={model} is not on this machine and cannot be fetched from the hub ({reason}); "
            "check the name and the connection, or give a folder."
        ) from None


def config_of(path: Path, any_family: bool = False) -> Any:
    """Return transformers' config of a located model, folder or GGUF file; see `read_config`."""
    return read_config(path, any_family) if path.is_dir() else GgufFile(path).config


def open_weights(path: Path, low_rank: bool = False, floats: bool = False) -> Weights:
    """Open the weights of a located model; see `open_folder`."""
    return open_folder(path, low_rank, floats) if path.is_dir() else Weights(path, GgufFile(path))


@lru_cache(maxsize=1)
def opened(path: Path, stamp: str) -> Weights:
    """Like `open_weights`, cached between the tasks of one process; `stamp` changes with the files."""
    return open_weights(path)


def tokenizer_of(path: Path) -> Any:
    """Open the tokenizer of a located model or an adapter's folder; raises `ConfigError` if it has none that opens."""
    return GgufFile(path).tokenizer() if path.is_file() else open_tokenizer(path)


def find_tokenizer(path: Path) -> Any:
    """Like `tokenizer_of`, but None if there is no tokenizer."""
    exists = has_tokenizer(path) if path.is_dir() else path.is_file() and GgufFile(path).tokens
    return tokenizer_of(path) if exists else None


def copy_tokenizer(path: Path, out: Path) -> bool:
    """Write the tokenizer and generation config of a located model into `out`; False if it has no tokenizer."""
    return GgufFile(path).save_tokenizer(out) if path.is_file() else save_tokenizer(path, out)
