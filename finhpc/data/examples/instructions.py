"""Examples to learn from: the records of every source, with its prompt template, as prompt and answer."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from finhpc.data.examples.chat import learned
from finhpc.data.examples.messages import messages_of, tools_of
from finhpc.data.examples.records import Record
from finhpc.data.examples.schema import Table, fields_of, guesses, open_sources
from finhpc.data.examples.values import each
from finhpc.errors import ConfigError
from finhpc.settings.finetune import Instructions


@dataclass(frozen=True)
class Example:
    """A prompt and its answer, or a conversation's `messages`, which a chat template writes (with its `tools`).

    `cut`: characters [start, stop) of the prompt whose end may be cut. `end`: an end token follows the answer.
    `input`: what it is split by.
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

    @property
    def content(self) -> str:
        """All that is learned from it, before a template or a tokenizer."""
        return json.dumps([self.prompt, self.answer, self.messages, self.tools], default=str)


@dataclass
class Source:
    """What one source gave."""

    name: str
    format: str
    template: str
    labels: tuple[str, ...]
    examples: list[Example]
    skipped: Counter[str]
    notes: list[str]


def read_examples(sources: list[str], settings: Instructions) -> list[Source]:
    """All examples of all sources, in order. Raises `ConfigError` with every problem of any of them."""
    opened = open_sources(sources, settings)
    found: list[Source] = []
    problems: list[str] = []
    for number, (spec, one) in enumerate(zip(sources, opened, strict=True)):
        try:
            examples = each(one.records, partial(_example, one=one, source=number))
            if not examples:
                raise ConfigError(f"data.source={spec} holds no example; give a file with records.")
        except ConfigError as error:
            problems += [problem for problem in error.problems if problem not in problems]
            continue
        form, names = one.form, one.meaning.labels if one.meaning else ()
        notes = [*one.reading.notes, *guesses(one)]
        found.append(
            Source(spec, one.format, form.name if form else "chat", names, examples, one.reading.skipped, notes)
        )
    if problems:
        raise ConfigError(problems)
    return found


def _example(record: Record, one: Table, source: int) -> Example:
    if one.form is None:
        return _from_chat(record, one.columns["messages"], source)
    form = one.form
    raw, label = fields_of(record, one)
    made = form.render(raw)
    return Example(
        made.prompt, form.separator + form.answer_of(raw), made.key, source, record.where, made.cut, form.end, label
    )  # fmt: skip


def _from_chat(record: Record, column: str, source: int) -> Example:
    messages = learned(messages_of(record.values, column, record.where), record.where)
    said = [message["content"] for message in messages if message["role"] == "user"] or [messages[0]["content"]]
    tools = tools_of(record.values, record.where)
    return Example("", "", said[0].strip(), source, record.where, (0, 0), messages=messages, tools=tools)


def labels_of(sources: list[Source]) -> Iterator[str]:
    """Every label of some source, once, in the templates' order."""
    yield from dict.fromkeys(label for source in sources for label in source.labels)
