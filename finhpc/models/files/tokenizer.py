"""The tokenizer of a model's or an adapter's folder: the same one for every command.

A folder's tokenizer.json decides, unless tokenizer_config.json names a class of its own. transformers' AutoTokenizer
also looks at the model's type: it opens every Qwen2 tokenizer as a Qwen2Tokenizer, whatever the model was trained with.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from finhpc.errors import ConfigError
from finhpc.models.files.config import OWN_CODE
from finhpc.models.files.tokens import GENERATION

log = logging.getLogger(__name__)

TOKENIZERS = ("tokenizer.json", "vocab.json", "tokenizer.model")  # a folder with one of them has a tokenizer
TOKENIZER_FILES = (
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
    *("spiece.model", "additional_chat_templates/*"),
)
# Names of one class, over versions.
GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend", "PreTrainedTokenizer")
PROBE = "In 2023 it's 12.5 % more:  don't\n\n caf\u00e9 ABC_def\tHello, how are you?"  # equal ids: equal tokenizers


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZERS)


def open_tokenizer(folder: Path) -> Any:
    """Open the tokenizer of a model's or an adapter's folder; raises `ConfigError` if that fails."""
    if not has_tokenizer(folder):
        raise ConfigError(
            f"model={folder} comes without a tokenizer (tokenizer.json); add the one that it was trained with."
        )
    with opens_or_refuses(folder):
        return read_tokenizer(str(folder), local_files_only=True)


@contextmanager
def opens_or_refuses(path: Path) -> Iterator[None]:
    """Turn what transformers and tokenizers raise into a `ConfigError`: they do not check the files."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ConfigError(
            f"model={path} comes without a tokenizer that opens ({reason}); add the one that it was trained with."
        ) from None


def read_tokenizer(name: str, **how: Any) -> Any:
    """Open the tokenizer of a folder or hub id with transformers' settings `how`; raises what transformers raises.

    Raises `ConfigError` for a tokenizer with Python code of its own, where transformers would ask at the terminal.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **how)
    except ValueError as error:
        if "trust_remote_code" in str(error):
            raise ConfigError(f"the tokenizer of {name} is {OWN_CODE}.") from None
        raise
    slow = Path(name).is_dir() and not (Path(name) / "tokenizer.json").is_file()
    own_class = get_tokenizer_config(name, **how).get("tokenizer_class") not in GENERIC
    if type(tokenizer) is PreTrainedTokenizerFast or slow or own_class:
        return tokenizer
    stored = PreTrainedTokenizerFast.from_pretrained(name, **how)
    if stored(PROBE).input_ids != tokenizer(PROBE).input_ids:
        _report(name, type(tokenizer).__name__)
    return stored


def save_tokenizer(folder: Path, out: Path) -> bool:
    """Copy the tokenizer and generation config of a folder into another; False if it has no tokenizer."""
    if (folder / GENERATION).is_file():
        shutil.copyfile(folder / GENERATION, out / GENERATION)
    if not has_tokenizer(folder):
        return False
    for file in (file for pattern in TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file()):
        (out / file.relative_to(folder)).parent.mkdir(exist_ok=True)
        shutil.copyfile(file, out / file.relative_to(folder))
    return True


@cache
def _report(name: str, kind: str) -> None:
    log.info(
        f"The tokenizer of {name} is opened as its tokenizer.json defines it. transformers' AutoTokenizer uses {kind}, "
        "as for every model of this type, and gives other ids: open it with PreTrainedTokenizerFast.from_pretrained."
    )
