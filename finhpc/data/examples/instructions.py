"""Examples to learn from: the records of every source as prompt and answer, by its prompt template."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from finhpc.data.examples.chat import Conversation, learned
from finhpc.data.examples.messages import messages_of, sides_of, tools_of
from finhpc.data.examples.schema import Table, fields_of, guesses, open_sources
from finhpc.data.examples.tables import Record
from finhpc.data.examples.templates import template
from finhpc.data.examples.values import each
from finhpc.errors import ConfigError, collect
from finhpc.settings.finetune import Instructions

LETTERS = re.compile(r"[\W_]+")
WRITTEN = "context_target"  # the template of prompts that a file contains in full


@dataclass(frozen=True)
class Example:
    """A prompt and its answer, or a conversation's `messages` (with its `tools`), which a chat template renders.

    `cut`: characters [start, stop) of the prompt whose end may be cut. `end`: an end token follows the answer.
    `input`: the text by which examples are split into training and held-out ones. `chat`: the rendered conversation.
    `rejected`: the other side of a pair, of which this is the chosen one.
    """

    prompt: str
    answer: str
    input: str
    source: int
    where: str
    cut: tuple[int, int]
    end: bool = False
    label: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: Any = None
    chat: Conversation | None = None
    rejected: Example | None = None

    @cached_property
    def key(self) -> bytes:
        """The hash of the input by which it is in one of the splits, see `split_key`."""
        return split_key(self.input)

    @property
    def content(self) -> str:
        """Everything that is learned, before a chat template and a tokenizer."""
        rejected = self.rejected.content if self.rejected else None
        return json.dumps([self.prompt, self.answer, self.messages, self.tools, rejected], default=str)


def split_key(text: str) -> bytes:
    """Return a hash of an input's letters and digits; case, spaces and punctuation do not count."""
    plain = LETTERS.sub("", unicodedata.normalize("NFKC", text).casefold()) or text.strip()
    return hashlib.sha256(plain.encode()).digest()


def is_held_out(key: bytes, fraction: float) -> bool:
    """Return whether an input with a `split_key` belongs to the held-out `fraction`."""
    return int.from_bytes(key[:8], "big") < int(fraction * 2**64)


@dataclass
class Source:
    """The examples of one source, its format, template and labels, and notes for the user."""

    name: str
    format: str
    template: str
    labels: tuple[str, ...]
    examples: list[Example]
    skipped: Counter[str]
    notes: list[str]


def read_examples(sources: list[str], settings: Instructions) -> list[Source]:
    """Return the examples of all sources, in order. Raises one `ConfigError` with every problem of all sources."""
    opened = open_sources(sources, settings)
    results: list[Source] = []
    problems: list[str] = []
    for number, (spec, table) in enumerate(zip(sources, opened, strict=True)):
        with collect(problems):
            examples = each(table.records, partial(_example, table=table, source=number))
            if not examples:
                raise ConfigError(f"data.source={spec} has no examples; give a file with records.")
            chats = examples[0].messages is not None
            used = table.form.name if table.form else "chat" if chats else WRITTEN
            labels = table.meaning.labels if table.meaning else ()
            notes = [*table.reading.notes, *guesses(table)]
            results.append(Source(spec, table.format, used, labels, examples, table.reading.skipped, notes))
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return results


def _example(record: Record, table: Table, source: int) -> Example:
    if table.format == "preference":
        return _from_pair(record, table.columns, source)
    if table.form is None:
        messages = messages_of(record.values, table.columns["messages"], record.where)
        return _of_chat(messages, tools_of(record.values, record.where), source, record.where)
    form = table.form
    raw, label = fields_of(record, table)
    prompt, cut, key = form.render(raw)
    return Example(prompt, form.separator + form.answer_of(raw), key, source, record.where, cut, form.end, label)


def _of_chat(messages: list[dict[str, Any]], tools: Any, source: int, where: str) -> Example:
    messages = learned(messages, where)
    first = next((message for message in messages if message["role"] == "user"), messages[0])
    return Example("", "", first["content"].strip(), source, where, (0, 0), messages=messages, tools=tools)


def _from_pair(record: Record, columns: dict[str, str], source: int) -> Example:
    """Return the chosen side, with the rejected one."""
    form, tools = template(WRITTEN), tools_of(record.values, record.where)

    def of_side(prompt: Any, answer: Any) -> Example:
        if not isinstance(answer, str):
            return _of_chat(answer, tools, source, record.where)
        text, _, key = form.render({"context": prompt})
        end = form.separator + answer
        return Example(text, end, key, source, record.where, (0, 0), form.end)

    prompt, *sides = sides_of(record.values, columns, record.where)
    chosen, rejected = (of_side(prompt, side) for side in sides)
    return replace(chosen, rejected=rejected)
