"""Examples -> token ids: the prompt as inference reads it, then the answer; long inputs are cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from finhpc.data.examples.chat import Conversation, control_tokens, rendered, rendered_ids
from finhpc.data.examples.instructions import Example
from finhpc.data.examples.values import each
from finhpc.errors import ConfigError
from finhpc.models.files.tokens import begin_ids, continuation_ids, encode

BATCH = 1000  # texts per call of the tokenizer
COMPARED = 100  # conversations whose prompts are encoded again as inference does


class Row(NamedTuple):
    """Ids of an example and a mask of its answer; `cut`: its input was cut."""

    tokens: list[int]
    answer: list[bool]
    cut: bool = False


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
    the ids that `apply_chat_template` gives; one with several answers may be split into several examples. `tokenizer`:
    one that passes `check_tokenizer`. Raises `ConfigError` for conversations that the template refuses and, unless
    `may_cut`, for examples that are too long.
    """
    examples, chats, notes = _rendered(examples, tokenizer)
    results: list[Tokenized] = []
    long: list[str] = []
    for first in range(0, len(examples), BATCH):
        batch, of_batch = examples[first : first + BATCH], chats[first : first + BATCH]
        for example, chat, row in zip(batch, of_batch, _rows(batch, of_batch, tokenizer), strict=True):
            if len(row.tokens) <= max_len:
                results.append(Tokenized(example, row))
            else:
                long.append(f"{example.where}: {len(row.tokens):,} tokens")
                results.append(Tokenized(example, _shorter(example, chat, tokenizer, max_len)))
    if long and not may_cut:
        more = f" and {len(long) - 5:,} more" if len(long) > 5 else ""
        raise ConfigError(
            f"data.max_len={max_len} is less than {len(long):,} examples need ({'; '.join(long[:5])}{more}); "
            "raise it, or let the end of inputs be cut with --data.cut input."
        )
    return results, notes + _notes(chats, [item.row for item in results], tokenizer)


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


def _rendered(examples: list[Example], tokenizer: Any) -> tuple[list[Example], list[Conversation | None], list[str]]:
    """Return the examples, the rendered conversation of each that is one, and notes about the template."""
    control = control_tokens(tokenizer)

    def written(example: Example) -> list[Conversation]:
        if example.messages is None:
            return []
        return rendered(example.messages, example.tools, example.where, tokenizer, control)

    pairs: list[tuple[Example, Conversation | None]] = []
    split = 0
    for example, several in zip(examples, each(examples, written), strict=True):
        split += len(several) > 1
        if not several:
            pairs.append((example, None))
        for chat in several:
            pairs.append((replace(example, prompt=chat.text[: chat.answers[0][0]]), chat))
    note = (
        f"{split:,} conversations were split into one example for each answer, because the chat template rewrites "
        "earlier turns"
    )
    return [example for example, _ in pairs], [chat for _, chat in pairs], [note] if split else []


def _rows(examples: list[Example], chats: list[Conversation | None], tokenizer: Any) -> list[Row]:
    """Return the tokens of each example, of any length."""
    results: dict[int, Row] = {}
    if plain := [i for i, chat in enumerate(chats) if chat is None]:
        prompts = encode(tokenizer, [examples[i].prompt for i in plain], plain=True)
        wholes = encode(tokenizer, [examples[i].prompt + examples[i].answer for i in plain], plain=True)
        begin = begin_ids(tokenizer)
        for i, prompt, whole in zip(plain, prompts, wholes, strict=True):
            answer = whole[len(prompt) :] if whole[: len(prompt)] == prompt else []
            answer = answer or continuation_ids(tokenizer, examples[i].prompt, examples[i].answer, plain=True)
            answer = answer + ([tokenizer.eos_token_id] if examples[i].end else [])
            prompt = begin + prompt
            results[i] = Row(prompt + answer, [False] * len(prompt) + [True] * len(answer))
    talks = {i: chat for i, chat in enumerate(chats) if chat is not None}
    if talks:
        added = frozenset(tokenizer.added_tokens_decoder)
        encoded = _with_offsets([chat.text for chat in talks.values()], tokenizer)
        for (i, chat), ids, offsets in zip(talks.items(), encoded["input_ids"], encoded["offset_mapping"], strict=True):
            results[i] = _talk(chat, ids, offsets, tokenizer, added)
    return [results[i] for i in range(len(examples))]


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
        return Row(list(ids), answer)
    if tokenizer.eos_token_id is None:
        raise ConfigError(NO_END)
    encoded = _with_offsets([chat.text[: chat.answers[-1][1]]], tokenizer)
    ids, answer = encoded["input_ids"][0], _inside(chat.answers, encoded["offset_mapping"][0])
    return Row([*ids, tokenizer.eos_token_id], [*answer, True])


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
    """Return the index of the last learned token."""
    return len(answer) - 1 - answer[::-1].index(True)


def _shorter(example: Example, chat: Conversation | None, tokenizer: Any, max_len: int) -> Row | None:
    """Drop later turns, then cut the end of the input, until the example fits; None if it cannot."""
    while chat is not None and len(chat.answers) > 1:
        answers = chat.answers[:-1]
        chat = chat._replace(text=chat.text[: answers[-1][1]], answers=answers)
        (row,) = _rows([example], [chat], tokenizer)
        if len(row.tokens) <= max_len:
            return row._replace(cut=True)
    if chat is None:
        start, stop = example.cut
        text = example.prompt

        def without(left: str) -> Row:
            return _rows([replace(example, prompt=text[:start] + left + text[stop:])], [None], tokenizer)[0]
    else:
        whole, text = chat, example.prompt
        start = text.rfind(example.input)
        # If the user writes after the first answer, nothing before it may be cut.
        start, stop = (start, start + len(example.input)) if start >= 0 else (len(text), len(text))

        def without(left: str) -> Row:
            less = stop - start - len(left)
            answers = tuple((a - less, b - less) for a, b in whole.answers)
            shorter = whole._replace(text=whole.text[:start] + left + whole.text[stop:], answers=answers)
            return _rows([example], [shorter], tokenizer)[0]

    return _cut(text, start, stop, without, chat is None, tokenizer, max_len)


def _cut(
    text: str, start: int, stop: int, without: Callable[[str], Row], plain: bool, tokenizer: Any, max_len: int
) -> Row | None:
    """Return the row with as much of the beginning of text[start:stop] as fits, or None."""
    offsets = _with_offsets([text], tokenizer, plain)["offset_mapping"][0]
    inside = [begins for begins, ends in offsets if start <= begins < stop and ends <= stop]
    over = len(without(text[start:stop]).tokens) - max_len
    while over < len(inside):
        left = text[start : inside[len(inside) - over]].rstrip()
        row = without(left)
        if left and len(row.tokens) <= max_len:
            return row._replace(cut=True)
        over += max(1, len(row.tokens) - max_len)
    return None


def _notes(chats: list[Conversation | None], rows: list[Row | None], tokenizer: Any) -> list[str]:
    """Return notes about a chat template: answers without an end, messages that it does not write."""
    talks = [(chat, row) for chat, row in zip(chats, rows, strict=True) if chat is not None and row is not None]
    if not talks:
        return []
    added = tokenizer.added_tokens_decoder
    last = [row.tokens[_last(row.answer)] for _, row in talks]
    endless = sum(token not in added for token in last)
    ended = 0
    for (chat, row), token in zip(talks, last, strict=True):
        written = str(added[token].content) if token in added else ""
        ended += row.answer[-1] and not chat.text[: chat.answers[-1][1]].endswith(written)
    other = sum(  # inference reads other ids before the first answer than were learned
        rendered_ids(chat.text[: chat.answers[0][0]], tokenizer) != row.tokens[: row.answer.index(True)]
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
