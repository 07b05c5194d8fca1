"""The tokenizer of a model folder, an adapter's folder or a GGUF file: the same one for every command.

A folder's tokenizer.json decides, unless tokenizer_config.json names a class of its own. transformers' AutoTokenizer
also looks at the model's type: it opens every Qwen2 tokenizer as a Qwen2Tokenizer, whatever the model was trained with.
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


def open_tokenizer(path: Path) -> Any:
    """Open the tokenizer of a model folder, adapter's folder or GGUF file; raises `ConfigError` if that fails."""
    if path.is_dir() and not has_tokenizer(path):
        raise ConfigError(f"model={path} comes without a tokenizer (tokenizer.json); add the one it was trained with.")
    try:
        if path.is_file():
            return _of_gguf(path)
        return read_tokenizer(str(path), local_files_only=True)
    except ConfigError:
        raise
    except Exception as error:  # transformers and tokenizers do not check the files and raise anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ConfigError(
            f"model={path} comes without a tokenizer that opens ({reason}); add the one it was trained with."
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


def find_tokenizer(path: Path) -> Any:
    """Open the tokenizer of a model folder, adapter's folder or GGUF file; None if it has none."""
    exists = has_tokenizer(path) if path.is_dir() else path.is_file() and GgufFile(path).tokens
    return open_tokenizer(path) if exists else None


def save_tokenizer(path: Path, out: Path) -> bool:
    """Write the tokenizer and generation config of a model folder or GGUF file; False if it has no tokenizer."""
    if path.is_dir():
        if (path / GENERATION).is_file():
            shutil.copyfile(path / GENERATION, out / GENERATION)
        if not has_tokenizer(path):
            return False
        for file in (file for pattern in TOKENIZER_FILES for file in path.glob(pattern) if file.is_file()):
            (out / file.relative_to(path)).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, out / file.relative_to(path))
        return True
    if not path.is_file():
        return False
    gguf = GgufFile(path)
    GenerationConfig.from_model_config(gguf.config).save_pretrained(out)
    if gguf.tokens:
        open_tokenizer(path).save_pretrained(out)
    return bool(gguf.tokens)


def _of_gguf(path: Path) -> Any:
    """Open the tokenizer in a GGUF file with only the file's own tokens; transformers adds its class's."""
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokens = GgufFile(path).tokens
    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    tree["added_tokens"] = [token for token in tree["added_tokens"] if token["id"] < tokens]
    own = {key: value for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(tree)),
        chat_template=tokenizer.chat_template,
        clean_up_tokenization_spaces=False,
        **own,
    )


@cache
def _report(name: str, kind: str) -> None:
    log.info(
        f"The tokenizer of {name} is opened as its tokenizer.json defines it. transformers' AutoTokenizer uses {kind}, "
        "as for every model of this type, and gives other ids: open it with PreTrainedTokenizerFast.from_pretrained."
    )
