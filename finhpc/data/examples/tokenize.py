"""Examples -> token ids: the prompt as inference reads it, then the answer; long inputs are cut."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from finhpc.data.examples.chat import Conversation, control_tokens, rendered, rendered_ids
from finhpc.data.examples.instructions import Example
from finhpc.data.examples.values import each
from finhpc.errors import ConfigError
from finhpc.models.files.tokens import begin_ids, continuation_ids, encode

BATCH = 1000  # texts per call of the tokenizer
PARALLEL = "TOKENIZERS_PARALLELISM"  # which the tokenizers library reads at each call
COMPARED = 100  # conversations whose prompts are encoded again as inference does


class Row(NamedTuple):
    """Ids of an example, int32 (n,), and a mask of its answer, bool (n,); `cut`: its input was cut."""

    tokens: npt.NDArray[np.int32]
    answer: npt.NDArray[np.bool_]
    cut: bool = False

    @classmethod
    def of(cls, tokens: Sequence[int], answer: Sequence[bool]) -> Row:
        return cls(np.array(tokens, np.int32), np.array(answer, np.bool_))


class Pair(NamedTuple):
    """The rows of both sides of a pair, each after the prompt."""

    where: str
    chosen: Row
    rejected: Row


class Tokenized(NamedTuple):
    """An example and its row, None if `max_len` leaves no room for the answer and a token of the input."""

    example: Example
    row: Row | None


def tokenized(
    examples: list[Example], tokenizer: Any, max_len: int, may_cut: bool
) -> tuple[list[Tokenized], list[str]]:
    """Return the tokens of each example, and notes for the user.

    For a prompt and its answer: the prompt's ids as inference reads them, then the answer's ids: those of the whole
    text, unless these do not begin with the prompt's own. Special tokens in a text are plain text. For a conversation:
    the ids that `apply_chat_template` gives; one with several answers may be split into several examples. For a pair:
    the prompt, the chosen answer, which is masked, and the rejected one; pairs are never cut. `tokenizer`: one that
    passes `check_tokenizer`. Raises `ConfigError` for conversations that the template refuses and, unless `may_cut`,
    for examples that are too long.
    """
    others, _ = _rendered([example.rejected for example in examples if example.rejected is not None], tokenizer)
    examples, notes = _rendered(examples, tokenizer)
    sides = iter(others)
    examples = [each if each.rejected is None else replace(each, rejected=next(sides)) for each in examples]
    results: list[Tokenized] = []
    long: list[str] = []
    for first in range(0, len(examples), BATCH):
        batch = examples[first : first + BATCH]
        with _all_cores():
            rows = _with_rejected(batch, _rows(batch, tokenizer), tokenizer)
        for example, row in zip(batch, rows, strict=True):
            if (needed := _length(example, row)) <= max_len:
                results.append(Tokenized(example, row))
            else:
                long.append(f"{example.where}: {needed:,} tokens")
                short = None if example.rejected is not None else _shorter(example, tokenizer, max_len)
                results.append(Tokenized(example, short))
    if long and not may_cut:
        more = f" and {len(long) - 5:,} more" if len(long) > 5 else ""
        raise ConfigError(
            f"data.max_len={max_len} is less than {len(long):,} examples need ({'; '.join(long[:5])}{more}); "
            "raise it, or let the end of inputs be cut with --data.cut input."
        )
    return results, notes + _notes(results, tokenizer)


@contextmanager
def _all_cores() -> Iterator[None]:
    """Let the tokenizer spread a batch over all cores; elsewhere it may not, as processes are forked after it ran."""
    before = os.environ.get(PARALLEL)
    os.environ[PARALLEL] = "true"
    try:
        yield
    finally:
        os.environ.pop(PARALLEL)
        if before is not None:
            os.environ[PARALLEL] = before


def check_tokenizer(tokenizer: Any, examples: list[Example]) -> None:
    """Raise `ConfigError` for a slow tokenizer, or one without the end token or the template that examples need.

    A padding token is not needed: packs are padded with positions that no token attends to.
    """
    if not tokenizer.is_fast:
        raise ConfigError("the tokenizer has no tokenizer.json (a slow tokenizer); convert it to a fast one.")
    if tokenizer.eos_token_id is None and any(example.end for example in examples):
        raise ConfigError(NO_END)
    if not getattr(tokenizer, "chat_template", None) and any(example.messages is not None for example in examples):
        raise ConfigError(
            "the tokenizer has no chat template, which records of `messages` need; use an instruction-tuned model's, "
            "or write the records as context and target."
        )


NO_END = (
    "the tokenizer has no end token (eos_token), so a generated answer could never end; set one in "
    "tokenizer_config.json."
)


def _rendered(examples: list[Example], tokenizer: Any) -> tuple[list[Example], list[str]]:
    """Return the examples, each conversation with its `chat`, and notes about the template."""
    control = control_tokens(tokenizer)

    def chats_of(example: Example) -> list[Conversation]:
        if example.messages is None:
            return []
        return rendered(example.messages, example.tools, example.where, tokenizer, control)

    results: list[Example] = []
    split = 0
    for example, chats in zip(examples, each(examples, chats_of), strict=True):
        split += len(chats) > 1
        results += [replace(example, prompt=chat.text[: chat.answers[0][0]], chat=chat) for chat in chats] or [example]
    note = (
        f"{split:,} conversations were split into one example for each answer, because the chat template rewrites "
        "earlier turns"
    )
    return results, [note] if split else []


def _rows(examples: list[Example], tokenizer: Any) -> list[Row]:
    results: dict[int, Row] = {}
    if plain := {i: example for i, example in enumerate(examples) if example.chat is None}:
        prompts = encode(tokenizer, [example.prompt for example in plain.values()], plain=True)
        wholes = encode(tokenizer, [example.prompt + example.answer for example in plain.values()], plain=True)
        begin = begin_ids(tokenizer)
        for (i, example), prompt, whole in zip(plain.items(), prompts, wholes, strict=True):
            answer = whole[len(prompt) :] if whole[: len(prompt)] == prompt else []
            answer = answer or continuation_ids(tokenizer, example.prompt, example.answer, plain=True)
            answer = answer + ([tokenizer.eos_token_id] if example.end else [])
            prompt = begin + prompt
            results[i] = Row.of(prompt + answer, [False] * len(prompt) + [True] * len(answer))
    if talks := {i: example.chat for i, example in enumerate(examples) if example.chat is not None}:
        added = frozenset(tokenizer.added_tokens_decoder)
        encoded = _with_offsets([chat.text for chat in talks.values()], tokenizer)
        for (i, chat), ids, offsets in zip(talks.items(), encoded["input_ids"], encoded["offset_mapping"], strict=True):
            results[i] = _talk(chat, ids, offsets, tokenizer, added)
    return [results[i] for i in range(len(examples))]


def _with_rejected(batch: list[Example], rows: list[Row], tokenizer: Any) -> list[Row]:
    """Return the rows, with the rejected answer after the chosen one in those of pairs."""
    pairs = [i for i, example in enumerate(batch) if example.rejected is not None]
    others = _rows([other for example in batch if (other := example.rejected) is not None], tokenizer)
    sides = [Pair(batch[i].where, rows[i], other) for i, other in zip(pairs, others, strict=True)]
    results = dict(zip(pairs, each(sides, _joined), strict=True))
    return [results.get(i, row) for i, row in enumerate(rows)]


def _joined(pair: Pair) -> Row:
    (first, last), (begin, end) = (np.flatnonzero(row.answer)[[0, -1]] for row in (pair.chosen, pair.rejected))
    tokens, rejected = pair.chosen.tokens[: last + 1], pair.rejected.tokens[begin : end + 1]
    if not np.array_equal(tokens[:first], pair.rejected.tokens[:begin]):
        raise ConfigError(
            f"{pair.where}: the tokenizer joins the end of the prompt to the beginning of an answer, so that chosen "
            "and rejected follow different prompts; change the prompt's last character, or remove the record."
        )
    if np.array_equal(tokens[first:], rejected):
        raise ConfigError(f"{pair.where}: chosen and rejected have the same tokens; remove the record.")
    mask = np.concatenate([pair.chosen.answer[: last + 1], np.zeros(len(rejected), np.bool_)])
    return Row(np.concatenate([tokens, rejected]), mask)


def _length(example: Example, row: Row) -> int:
    """Return the tokens of an example; of a pair, those of its longer side."""
    if example.rejected is None:
        return len(row.tokens)
    first, last = np.flatnonzero(row.answer)[[0, -1]].tolist()
    return int(first + max(last + 1 - first, len(row.tokens) - last - 1))


def _with_offsets(texts: list[str], tokenizer: Any, plain: bool = False) -> Any:
    return tokenizer(
        texts, add_special_tokens=False, split_special_tokens=plain, return_offsets_mapping=True, verbose=False
    )


def _talk(
    chat: Conversation, ids: list[int], offsets: list[tuple[int, int]], tokenizer: Any, added: frozenset[int]
) -> Row:
    """Return a conversation's row; an end token follows the last answer unless the template ends it with one."""
    answer = _inside(chat.answers, offsets)
    # The marks of a template are followed exactly.
    if chat.marked or ids[_last(answer)] in added:
        return Row.of(ids, answer)
    if tokenizer.eos_token_id is None:
        raise ConfigError(NO_END)
    encoded = _with_offsets([chat.text[: chat.answers[-1][1]]], tokenizer)
    ids, answer = encoded["input_ids"][0], _inside(chat.answers, encoded["offset_mapping"][0])
    return Row.of([*ids, tokenizer.eos_token_id], [*answer, True])


def _inside(spans: tuple[tuple[int, int], ...], offsets: list[tuple[int, int]]) -> list[bool]:
    """Return a mask of the tokens with a character of a span; a token without characters counts as its next one."""
    results: list[bool] = []
    at = 0
    for begins, ends in offsets:
        while at < len(spans) and spans[at][1] <= begins:
            at += 1
        results.append(at < len(spans) and spans[at][0] < max(ends, begins + 1))
    return results


def _last(answer: list[bool]) -> int:
    return len(answer) - 1 - answer[::-1].index(True)


def _shorter(example: Example, tokenizer: Any, max_len: int) -> Row | None:
    """Drop later turns, then cut the end of the input, until the example fits; None if it cannot."""
    while example.chat is not None and len(example.chat.answers) > 1:
        answers = example.chat.answers[:-1]
        chat = example.chat._replace(text=example.chat.text[: answers[-1][1]], answers=answers)
        example = replace(example, chat=chat)
        (row,) = _rows([example], tokenizer)
        if len(row.tokens) <= max_len:
            return row._replace(cut=True)
    text, (start, stop) = example.prompt, example.cut
    if example.chat is not None:
        start = text.rfind(example.input)
        # If the user writes after the first answer, nothing before it may be cut.
        start, stop = (start, start + len(example.input)) if start >= 0 else (len(text), len(text))
    offsets = _with_offsets([text], tokenizer, plain=example.chat is None)["offset_mapping"][0]
    inside = [begins for begins, ends in offsets if start <= begins < stop and ends <= stop]
    over = len(_rows([example], tokenizer)[0].tokens) - max_len
    while over < len(inside):
        left = text[start : inside[len(inside) - over]].rstrip()
        (row,) = _rows([_with_input(example, start, stop, left)], tokenizer)
        if left and len(row.tokens) <= max_len:
            return row._replace(cut=True)
        over += max(1, len(row.tokens) - max_len)
    return None


def _with_input(example: Example, start: int, stop: int, left: str) -> Example:
    """Return an example with `left` in place of the characters [start, stop) of its prompt."""
    prompt = example.prompt[:start] + left + example.prompt[stop:]
    if (chat := example.chat) is None:
        return replace(example, prompt=prompt)
    less = stop - start - len(left)
    answers = tuple((begin - less, end - less) for begin, end in chat.answers)
    text = chat.text[:start] + left + chat.text[stop:]
    return replace(example, prompt=prompt, chat=chat._replace(text=text, answers=answers))


def _notes(items: list[Tokenized], tokenizer: Any) -> list[str]:
    """Return notes about a chat template: answers without an end, messages that it does not write."""
    talks = [(example.chat, row) for example, row in items if example.chat is not None and row is not None]
    if not talks:
        return []
    added = tokenizer.added_tokens_decoder
    last = [int(row.tokens[row.answer][-1]) for _, row in talks]
    endless = sum(token not in added for token in last)
    ended = 0
    for (chat, row), token in zip(talks, last, strict=True):
        written = str(added[token].content) if token in added else ""
        ended += bool(row.answer[-1]) and not chat.text[: chat.answers[-1][1]].endswith(written)
    other = sum(  # inference reads other ids before the first answer than were learned
        rendered_ids(chat.text[: chat.answers[0][0]], tokenizer) != row.tokens[: row.answer.argmax()].tolist()
        for chat, row in talks[:COMPARED]
        if not row.cut
    )
    left_out = sorted({role for chat, _ in talks for role in chat.left_out})
    texts = {
        f"conversations got {tokenizer.eos_token} after their last answer, since the chat template ends it with no "
        "token": ended,
        "conversations do not teach where to end: the chat template's {% generation %} leaves out the end of an "
        "answer": endless,
        f"of the first {min(COMPARED, len(talks)):,} conversations have answers whose first token begins in the "
        "prompt, which inference reads otherwise": other,
        f"conversations have messages that the chat template does not write ({', '.join(left_out)})": sum(
            bool(chat.left_out) for chat, _ in talks
        ),
    }
    return [f"{number:,} {text}" for text, number in texts.items() if number]
