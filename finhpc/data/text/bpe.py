"""A byte-level BPE run by tiktoken: the Hugging Face tokenizer's ids, several times as fast.

`why_not` tells whether tiktoken can replace a saved tokenizer. It can if both must give the same ids for every text:

- the tokenizer only splits text as GPT-2 does and merges bytes;
- every entry of its vocabulary that merges make is what its own bytes merge to. tiktoken joins any two neighbors
  whose bytes together are an entry, Hugging Face only the listed pair. These are the same pair: the borders around
  neighbors were crossed by no earlier merge, so inside them everything went as it does for the entry's bytes alone;
- both regex engines agree on which characters are letters, numbers and spaces.
"""

from __future__ import annotations

import re
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt

# How GPT-2 splits text. Its first release wrote this with `+` and ended in `\s+(?!\S)|\s+`; this is tiktoken's way,
# without backtracking, for which long runs of letters or spaces are no problem.
GPT2_SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
CLASSES = (r"\p{L}", r"\p{N}", r"\s")
# Versions of (tokenizers, tiktoken) whose classes were compared over all code points; a test compares them again.
# Others are compared when a tokenizer is first opened, which takes three seconds.
COMPARED = {("0.23.3", "0.14.0")}
# tiktoken's regex engine gives up on a run of about a million spaces; texts with a tenth of it go another way.
LONG_RUN = 100_000
_SPACES = re.compile(rf"\s{{{LONG_RUN}}}")

# The values in `tokenizer.json`, besides vocabulary and merges, of a model that only merges bytes.
_PLAIN_MODEL: dict[str, tuple[Any, ...]] = {
    "type": ("BPE",),
    "dropout": (None, 0.0),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "byte_fallback": (False,),
    "ignore_merges": (False,),
}
_ANY_VALUE = ("vocab", "merges", "unk_token", "fuse_unk")  # nothing is unknown if every byte is an entry
_PLAIN_SPLIT = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


class MergedBytes:
    """Text -> ranks: 0 to 255 are the bytes, then the results of the merges in their order. `ids[rank]` is the id."""

    def __init__(self, tree: dict[str, Any]) -> None:
        """`tree`: the content of a `tokenizer.json` that passes `why_not`."""
        from tiktoken import Encoding

        vocab, byte_of = tree["model"]["vocab"], _byte_of_character()
        names = [*byte_of, *map("".join, _merges(tree))]
        ranks = {bytes(map(byte_of.__getitem__, name)): rank for rank, name in enumerate(names)}
        # No special tokens: in a text they are plain text.
        encoding = Encoding("saved", pat_str=GPT2_SPLIT, mergeable_ranks=ranks, special_tokens={})
        self.ids: npt.NDArray[np.int64] = np.array([vocab[name] for name in names], np.int64)
        self._encode = encoding.encode_ordinary

    def ranks(self, text: str) -> list[int] | None:
        """Return the ranks of a text, or None if tiktoken's regex engine cannot process it."""
        if has_long_run(text):
            return None
        try:
            return self._encode(text)
        except BaseException as error:  # a panic of the engine is not an Exception
            if type(error).__name__ != "PanicException":
                raise
            return None


def why_not(tree: dict[str, Any], tokenizer: Any) -> str | None:
    """Return why tiktoken might not give a tokenizer's ids, or None if it does for every text.

    `tree`: the content of its `tokenizer.json`; `tokenizer`: the same, opened.
    """
    if reason := _not_plain(tree) or _not_merged(tree, tokenizer):
        return reason
    if (version("tokenizers"), version("tiktoken")) not in COMPARED and (unlike := unlike_code_points()):
        return f"tokenizers and tiktoken differ on what U+{unlike[0]:04X} is, and {len(unlike) - 1} other characters"
    return None


def has_long_run(text: str) -> bool:
    """Return whether a text has a run of `LONG_RUN` spaces, newlines and the like."""
    # Such a run covers one of every LONG_RUN characters: most texts need no search.
    return any(map(str.isspace, text[LONG_RUN - 1 :: LONG_RUN])) and _SPACES.search(text) is not None


def unlike_code_points() -> list[int]:
    """Return code points that the regex engines of tokenizers and tiktoken put into different classes."""
    from tiktoken import Encoding
    from tokenizers import Regex, normalizers

    everything = "".join(chr(point) for point in range(0x110000) if not 0xD800 <= point < 0xE000)
    single = {bytes([byte]): byte for byte in range(256)}
    unlike: set[str] = set()
    for name in CLASSES:
        # What the pattern does not match, tiktoken leaves out; what it matches, Replace takes out.
        matcher = Encoding("class", pat_str=f"{name}+", mergeable_ranks=single, special_tokens={})
        there = set(bytes(matcher.encode_ordinary(everything)).decode())
        here = set(everything) - set(normalizers.Replace(Regex(f"{name}+"), "").normalize_str(everything))
        unlike |= there ^ here
    return sorted(map(ord, unlike))


def _not_plain(tree: dict[str, Any]) -> str | None:
    """Return what the tokenizer does besides splitting as GPT-2 does and merging bytes."""
    model, split = tree["model"], tree.get("pre_tokenizer") or {}
    for name, value in model.items():
        if name not in _ANY_VALUE and value not in _PLAIN_MODEL.get(name, (None,)):
            return f"its model has {name}={value!r}"
    if tree.get("normalizer") is not None:
        return f"it normalizes text ({tree['normalizer'].get('type')})"
    for name, value in _PLAIN_SPLIT.items():
        if split.get(name, True if name == "use_regex" else None) != value:
            return f"it does not split text as GPT-2 does (pre_tokenizer {name}={split.get(name)!r})"
    ordinary = [token["content"] for token in tree.get("added_tokens", []) if not token.get("special")]
    if ordinary:
        return f"it finds added tokens in text ({ordinary[0]!r})"
    return None


def _not_merged(tree: dict[str, Any], tokenizer: Any) -> str | None:
    """Return which entry of the vocabulary is not what its own bytes merge to."""
    from tokenizers import Tokenizer

    vocab, made = tree["model"]["vocab"], set(_byte_of_character())
    if not made <= vocab.keys():
        return "its vocabulary lacks some bytes"
    merges = _merges(tree)
    for left, right in merges:
        if left not in made or right not in made:
            return f"it merges {left!r} and {right!r} before both are made"
        if (name := left + right) in made:
            return f"it makes {name!r} by two merges"
        if name not in vocab:
            return f"its vocabulary lacks {name!r}, which it makes"
        made.add(name)
    names = ["".join(pair) for pair in merges]
    alone = Tokenizer(tokenizer.model).encode_batch_fast(names, add_special_tokens=False)
    for name, encoding in zip(names, alone, strict=True):
        if encoding.ids != [vocab[name]]:
            return f"the bytes of {name!r} do not merge to it"
    return None


def _merges(tree: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the pairs, from either way of writing them."""
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in tree["model"]["merges"])
    return [(left, right) for left, right in pairs]


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: a visible character for each byte."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}
