"""Conventions between a model and its tokenizer: begin tokens, end tokens, the number of ids."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from finhpc.errors import CheckpointError, ConfigError

GENERATION = "generation_config.json"
# Texts to encode an answer after, if the ids of its own prompt change when it follows.
ANCHORS = ("\n", "a", ")")
QUESTION, ANSWER = "Q7q", "A7a"


def encode(tokenizer: Any, texts: list[str], plain: bool = False) -> list[list[int]]:
    """Return the ids of texts without begin and end tokens. `plain`: special tokens in a text are plain text."""
    ids: list[list[int]] = tokenizer(
        texts, add_special_tokens=False, split_special_tokens=plain, verbose=False
    )["input_ids"]  # fmt: skip
    return ids


def begin_ids(tokenizer: Any) -> list[int]:
    """Return the ids that the tokenizer adds before a text: its begin token, usually, or nothing.

    Ids that it adds after a text (an end token, a separator) do not belong to a prompt, because a prompt continues.
    """
    encoded = tokenizer("a", return_special_tokens_mask=True, verbose=False)
    ids, added = encoded["input_ids"], encoded["special_tokens_mask"]
    return list(ids[: next((i for i, mark in enumerate(added) if not mark), 0)])


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of a prompt for finetuning, generation and evaluation: the begin token and the text, no end.

    An empty prompt starts like a document. Raises `ConfigError` if the tokenizer has no token for that.
    """
    begin, (ids,) = begin_ids(tokenizer), encode(tokenizer, [text])
    if begin and ids[: len(begin)] != begin:  # unless the text contains it
        ids = begin + ids
    if ids:
        return ids
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise ConfigError(
            "the prompt is empty, and the tokenizer has neither a begin token nor an end token to start from; write a "
            "prompt."
        )
    return [int(start)]


def continuation_ids(tokenizer: Any, prompt: str, answer: str, plain: bool = False) -> list[int]:
    """Return the ids of `answer` after the prompt's own ids.

    They are taken from the whole text if its ids begin with the prompt's; otherwise from the answer in the middle of
    another text, because many tokenizers add a space at the beginning of a text.
    """
    for before in (prompt, *ANCHORS):
        start, full = encode(tokenizer, [before, before + answer], plain)
        if start and full[: len(start)] == start and len(full) > len(start):
            return full[len(start) :]
    return encode(tokenizer, [answer], plain)[0]


def decoded(tokenizer: Any, before: list[int], ids: list[int]) -> str:
    """Return the text of `ids` after that of `before`, with the leading space that a tokenizer drops from a text."""

    def text(some: list[int]) -> str:
        return str(tokenizer.decode(some, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    prompt, full = text(before), text([*before, *ids])
    if full.startswith(prompt):
        return full[len(prompt) :]
    same = next((i for i, (a, b) in enumerate(zip(prompt, full, strict=False)) if a != b), len(full))
    return full[same:]


def largest_id(tokenizer: Any) -> int:
    """Return the largest id that a text can have; a token that only pads does not count."""
    pad = pad_alone(tokenizer)
    return max((i for token, i in tokenizer.get_vocab().items() if token != pad), default=-1)


def pad_alone(tokenizer: Any) -> str | None:
    """Return the padding token, if the tokenizer gives it no other meaning."""
    pad, ends = tokenizer.pad_token, (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token)
    return None if pad in ends else pad


def check_rows(tokenizer: Any, rows: int, where: str) -> None:
    """Raise `ConfigError` if the tokenizer of the model `where` has ids without a row in its embedding.

    An embedding may have more rows than there are ids (many are padded), and a token that only pads needs none.
    """
    largest = largest_id(tokenizer)
    if largest >= rows:
        raise ConfigError(
            f"{where} has an embedding of {rows:,} rows, but its tokenizer has ids up to {largest:,} "
            f"({largest + 1:,} ids), so that some texts cannot be read; use the tokenizer that the model was trained "
            "with, or resize the model's embedding (transformers' resize_token_embeddings)."
        )


def end_of_turn(tokenizer: Any) -> int | None:
    """Return the id of the token with which the chat template ends an answer; None if there is none."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception:  # a template may raise anything: it does not support such a conversation
        return None
    (ids,) = encode(tokenizer, [text[text.rfind(ANSWER) + len(ANSWER) :].strip()] if ANSWER in text else [""])
    return next((token for token in ids if token in tokenizer.added_tokens_decoder), None)


def stop_ids(tokenizer: Any, *configs: Any) -> list[int]:
    """Return the ids that end a generated text: of generation or model configs, tokenizer and chat template."""
    ids: list[Any] = []
    for config in configs:
        own = config.get("eos_token_id") if isinstance(config, dict) else getattr(config, "eos_token_id", None)
        ids += own if isinstance(own, list) else [own]
    ids += [tokenizer.eos_token_id, end_of_turn(tokenizer)]
    if wrong := [token for token in ids if token is not None and type(token) is not int]:
        raise CheckpointError(
            f"eos_token_id={wrong[0]!r} in {GENERATION} or config.json is not the id of a token; correct it."
        )
    return list(dict.fromkeys(token for token in ids if token is not None))


def generation_config(folder: Path) -> dict[str, Any]:
    """Return the content of a folder's generation_config.json; empty without one."""
    path = folder / GENERATION
    if not path.is_file():
        return {}
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        ends = tree.get("eos_token_id")
    except (OSError, ValueError, AttributeError):
        raise CheckpointError(f"{path} is not a JSON object; restore it, or remove it to do without.") from None
    if not all(isinstance(token, int) for token in (ends if isinstance(ends, list) else [ends or 0])):
        raise CheckpointError(f"{path} has eos_token_id={ends!r}, not an id or a list of ids; correct it.")
    return tree  # type: ignore[no-any-return]


def write_stops(folder: Path, ids: Iterable[int], config: Any) -> None:
    """Add `ids` to the ids that end a text in generation_config.json of a model's or an adapter's folder.

    `config`: the model's, whose ids count if the folder has no such file. Nothing is written if all are listed already.
    """
    tree = generation_config(folder)
    own = tree["eos_token_id"] if "eos_token_id" in tree else getattr(config, "eos_token_id", None)
    before = [token for token in (own if isinstance(own, list) else [own]) if token is not None]
    if new := [token for token in ids if token not in before]:
        every = [*before, *new]
        tree["eos_token_id"] = every if len(every) > 1 else every[0]
        (folder / GENERATION).write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
