"""Examples to token ids: the prompt as inference reads it, the answer behind it, long inputs cut."""

from __future__ import annotations

from typing import Any, NamedTuple

from finhpc.data.instructions import Example
from finhpc.errors import ConfigError

BATCH = 1000  # texts the tokeniser is given at once


class Row(NamedTuple):
    """Ids of an example and which of them are its answer's; `cut`: its input was."""

    tokens: list[int]
    answer: list[bool]
    cut: bool


def rows(examples: list[Example], tokenizer: Any, max_len: int, may_cut: bool) -> list[Row | None]:
    """Each example's tokens, None where `max_len` leaves no room for its answer and a token of its input.

    The ids are those of the whole text, as a plain loop has them, where these begin with the prompt's
    own; else prompt and answer are tokenised apart: inference reads the prompt alone. Special tokens
    in a text are plain text, but a chat template's own. Raises `ConfigError` for a tokeniser without
    an end token where answers need one, and, unless `may_cut`, with the examples that are too long.
    """
    check_tokenizer(tokenizer, examples)
    begin = _begin(tokenizer)
    end = [tokenizer.eos_token_id]
    found: list[Row | None] = []
    long: list[str] = []
    for first in range(0, len(examples), BATCH):
        part = examples[first : first + BATCH]
        for example, pieces in zip(part, _pieces(part, tokenizer), strict=True):
            pieces[0] = (begin if not example.markup else []) + pieces[0]
            pieces[-1] = pieces[-1] + (end if example.end else [])
            if (length := sum(map(len, pieces))) <= max_len:
                found.append(_row(pieces, cut=False))
                continue
            long.append(f"{example.where}: {length:,} tokens")
            found.append(_shorter(example, pieces, tokenizer, begin, max_len))
    if long and not may_cut:
        more = f" and {len(long) - 5:,} more" if len(long) > 5 else ""
        raise ConfigError(
            f"data.max_len={max_len} is less than {len(long):,} examples need ({'; '.join(long[:5])}{more}); "
            "raise it, or let the end of inputs be cut with --data.cut input."
        )
    return found


def check_tokenizer(tokenizer: Any, examples: list[Example]) -> None:
    """Raise `ConfigError` for a slow tokeniser, or one without the end token that answers need.

    A padding token is not needed: packs are padded with positions that nothing looks at.
    """
    if not tokenizer.is_fast:
        raise ConfigError("the tokeniser has no tokenizer.json (a slow tokeniser); convert it to a fast one.")
    if tokenizer.eos_token_id is None and any(example.end for example in examples):
        raise ConfigError(
            "the tokeniser has no end token (eos_token), so a generated answer could never end; set one in "
            "tokenizer_config.json."
        )


def _begin(tokenizer: Any) -> list[int]:
    """What the tokeniser puts before a text: its begin token, or nothing."""
    ids = tokenizer("a")["input_ids"]
    return [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id else []


def _encode(texts: list[str], tokenizer: Any, markup: bool) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(
        texts, add_special_tokens=False, split_special_tokens=not markup, verbose=False
    )["input_ids"]  # fmt: skip
    return ids


def _pieces(examples: list[Example], tokenizer: Any) -> list[list[list[int]]]:
    """Ids of prompt, answer, prompt, answer ... of each example."""
    found: list[list[list[int]]] = [[] for _ in examples]
    plain = [i for i, example in enumerate(examples) if not example.markup]
    if plain:
        prompts = _encode([examples[i].prompt for i in plain], tokenizer, False)
        wholes = _encode([examples[i].prompt + examples[i].answer for i in plain], tokenizer, False)
        for i, prompt, whole in zip(plain, prompts, wholes, strict=True):
            apart = whole[: len(prompt)] != prompt or len(whole) == len(prompt)
            answer = _encode([examples[i].answer], tokenizer, False)[0] if apart else whole[len(prompt) :]
            found[i] = [prompt, answer]
    for i, example in enumerate(examples):
        if example.markup:
            turns = [(example.prompt, example.answer), *example.more]
            found[i] = _encode([text for turn in turns for text in turn], tokenizer, True)
    return found


def _row(pieces: list[list[int]], cut: bool) -> Row:
    answer = [place % 2 == 1 for place, piece in enumerate(pieces) for _ in piece]
    return Row([token for piece in pieces for token in piece], answer, cut)


def _shorter(example: Example, pieces: list[list[int]], tokenizer: Any, begin: list[int], max_len: int) -> Row | None:
    """Later turns left out, then the end of the input cut, until the rest fits."""
    while len(pieces) > 2 and sum(map(len, pieces)) > max_len:
        pieces = pieces[:-2]
    room = max_len - len(pieces[1])
    if len(pieces[0]) <= room:
        return _row(pieces, cut=True)
    start, stop = example.cut
    text, marks = example.prompt, not example.markup
    encoded = tokenizer(
        text, add_special_tokens=False, split_special_tokens=marks, return_offsets_mapping=True, verbose=False
    )
    inside = [begins for begins, ends in encoded["offset_mapping"] if start <= begins < stop and ends <= stop]
    over = len(pieces[0]) - room
    head = begin if marks else []
    while over < len(inside):
        kept = text[start : inside[len(inside) - over]].rstrip()
        ids = head + _encode([text[:start] + kept + text[stop:]], tokenizer, example.markup)[0]
        if kept and len(ids) <= room:
            return _row([ids, pieces[1]], cut=True)
        over += max(1, len(ids) - room)
    return None
