"""The tokenizer of a model folder, an adapter's folder or a GGUF file: the same one for every command.

What a folder's tokenizer.json holds is what counts, if tokenizer_config.json names no class of its own for it.
transformers' AutoTokenizer looks at the model's type as well: of every Qwen2 it makes a Qwen2Tokenizer, whatever the
tokenizer that the model was trained with.
"""

from __future__ import annotations

import json
import logging
import shutil
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from finhpc.errors import ConfigError
from finhpc.models.files.config import OWN_CODE
from finhpc.models.files.gguf import GgufFile
from finhpc.models.files.tensor_folder import GENERATION, copy_tokenizer, has_tokenizer

log = logging.getLogger(__name__)

GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend", "PreTrainedTokenizer")  # the same, by its names over time
PROBE = "In 2023 it's 12.5 % more:  don't\n\n caf\u00e9 ABC_def\tHello, how are you?"  # read alike, all is read alike


def open_tokenizer(path: Path) -> Any:
    """The tokenizer of a model folder, adapter's folder or GGUF file; raises `ConfigError` if none opens."""
    if path.is_dir() and not has_tokenizer(path):
        raise ConfigError(f"model={path} comes without a tokenizer (tokenizer.json); add the one it was trained with.")
    try:
        if path.is_file():
            return _of_gguf(path)
        return read_tokenizer(str(path), local_files_only=True)
    except ConfigError:
        raise
    except Exception as error:  # transformers and tokenizers trust the files, and raise whatever comes first
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ConfigError(
            f"model={path} comes without a tokenizer that opens ({reason}); add the one it was trained with."
        ) from None


def read_tokenizer(name: str, **how: Any) -> Any:
    """The tokenizer of a folder or hub id; raises what transformers raises, of many kinds. `how`: its settings.

    Raises `ConfigError` for one that brings Python code of its own: left to itself, transformers asks at the terminal.
    """
    try:
        found = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **how)
    except ValueError as error:
        if "trust_remote_code" in str(error):
            raise ConfigError(f"the tokenizer of {name} is {OWN_CODE}.") from None
        raise
    slow = Path(name).is_dir() and not (Path(name) / "tokenizer.json").is_file()
    own_class = get_tokenizer_config(name, **how).get("tokenizer_class") not in GENERIC
    if type(found) is PreTrainedTokenizerFast or slow or own_class:
        return found
    written = PreTrainedTokenizerFast.from_pretrained(name, **how)
    if written(PROBE).input_ids != found(PROBE).input_ids:
        _report(name, type(found).__name__)
    return written


def find_tokenizer(path: Path) -> Any:
    """The tokenizer of a model folder, adapter's folder or GGUF file; None if it has none."""
    there = has_tokenizer(path) if path.is_dir() else path.is_file() and GgufFile(path).tokens
    return open_tokenizer(path) if there else None


def save_tokenizer(path: Path, out: Path) -> bool:
    """Write the tokenizer and generation config of a model folder or GGUF file; False if it has no tokenizer."""
    if path.is_dir():
        if (path / GENERATION).is_file():
            shutil.copyfile(path / GENERATION, out / GENERATION)
        return copy_tokenizer(path, out)
    if not path.is_file():
        return False
    gguf = GgufFile(path)
    GenerationConfig.from_model_config(gguf.config).save_pretrained(out)
    if gguf.tokens:
        open_tokenizer(path).save_pretrained(out)
    return bool(gguf.tokens)


def _of_gguf(path: Path) -> Any:
    """The tokenizer in a GGUF file, with the file's own tokens: transformers adds those of the class it takes."""
    found = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokens = GgufFile(path).tokens
    tree = json.loads(found.backend_tokenizer.to_str())
    tree["added_tokens"] = [token for token in tree["added_tokens"] if token["id"] < tokens]
    own = {key: value for key, value in found.special_tokens_map.items() if isinstance(value, str)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(tree)),
        chat_template=found.chat_template,
        clean_up_tokenization_spaces=False,
        **own,
    )


@cache
def _report(name: str, kind: str) -> None:
    log.info(
        f"The tokenizer of {name} is read as its tokenizer.json says. transformers' AutoTokenizer takes {kind}, as for "
        "every model of this type, and gives other ids: open it with PreTrainedTokenizerFast.from_pretrained.",
    )
