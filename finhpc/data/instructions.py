"""Examples to learn from: the records of every source, with its prompt template, as prompt and answer."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from finhpc.config import Instructions, nearest
from finhpc.data.chat import checked
from finhpc.data.records import Record, read_records, split_name
from finhpc.data.templates import Template, template
from finhpc.errors import ConfigError

SHOWN = 5  # broken records that are named, of all


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


class Format(NamedTuple):
    """What a kind of record is called in its columns, and the template it gets. `meaning`: label by raw value."""

    template: str
    columns: dict[str, str]
    meaning: dict[str, str]


FORMATS = {
    "phrasebank": Format(
        "phrasebank", {"input": "sentence", "label": "label"}, {"0": "negative", "1": "neutral", "2": "positive"}
    ),
    "tfns": Format(
        "tfns",
        {"input": "text", "label": "label"},
        {"0": "negative", "1": "positive", "2": "neutral", "bearish": "negative", "bullish": "positive"},
    ),
    "fiqa": Format("fiqa", {"input": "sentence", "label": "label"}, {}),
    "conll": Format("ner", {"input": "sentence", "entity": "entity", "label": "label"}, {}),
    "alpaca": Format("alpaca", {"instruction": "instruction", "input": "input", "output": "output"}, {}),
    "context_target": Format("context_target", {"context": "context", "target": "target"}, {}),
    "labelled": Format("phrasebank", {"input": "input", "label": "label"}, {}),
    "chat": Format("", {"messages": "messages"}, {}),
}


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
    """All examples of all sources, in order. Raises `ConfigError` with every problem found in any of them."""
    found: list[Source] = []
    problems: list[str] = []
    for number, spec in enumerate(sources):
        try:
            found.append(_read(number, spec, settings))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return found


def format_of(spec: str, settings: Instructions) -> str:
    """The format of a source, named or told by its columns; raises `ConfigError` where it is of no known one."""
    path, named = split_name(spec, FORMATS)
    if named:
        return named
    reading = read_records(path, settings.encoding, settings.hf_split)
    return _detect(reading.source, reading.columns, settings)


def _read(number: int, spec: str, settings: Instructions) -> Source:
    path, named = split_name(spec, FORMATS)
    reading = read_records(path, settings.encoding, settings.hf_split, named)
    kind = named or _detect(reading.source, reading.columns, settings)
    labels: tuple[str, ...] = ()
    if kind == "chat":
        used, columns = "chat", {"messages": settings.columns.get("messages", "messages")}
    else:
        form = template(settings.template or FORMATS[kind].template)
        used, labels, columns = form.name, form.labels, _columns(form, kind, settings)
    _check_columns(reading.source, reading.columns, columns)
    examples: list[Example] = []
    problems: list[str] = []
    for record in reading.records:
        try:
            if kind == "chat":
                examples.append(_from_chat(record, columns["messages"], number))
            else:
                examples.append(_from_record(record, form, columns, FORMATS[kind].meaning, number))
        except ConfigError as error:
            problems += error.problems
    if problems:
        more = [f"{reading.source}: {len(problems) - SHOWN:,} more such records."] if len(problems) > SHOWN else []
        raise ConfigError(problems[:SHOWN] + more)
    if not examples:
        raise ConfigError(f"data.source={spec} holds no example; give a file with records.")
    return Source(spec, kind, used, labels, examples, reading.skipped, reading.notes)


def _detect(source: str, columns: list[str], settings: Instructions) -> str:
    """The format whose columns are there."""
    have = set(columns)
    if settings.columns:
        return "chat" if "messages" in settings.columns else _by_fields(set(settings.columns))
    for kind, needed in (
        ("chat", {"messages"}),
        ("alpaca", {"instruction", "output"}),
        ("context_target", {"context", "target"}),
        ("conll", {"sentence", "entity", "label"}),
        ("tfns", {"text", "label"}),
        ("labelled", {"input", "label"}),
    ):
        if needed <= have:
            return kind
    if {"sentence", "label"} <= have:
        return "fiqa" if source.endswith(".json") else "phrasebank"
    raise ConfigError(
        f"{source}: its columns ({', '.join(columns)}) are of no known format; name the format (FILE:FORMAT, one of "
        f"{', '.join(FORMATS)}), and say which columns hold its fields with --data.columns, such as "
        "input=COLUMN label=COLUMN."
    )


def _by_fields(fields: set[str]) -> str:
    if fields & {"instruction", "output"}:
        return "alpaca"
    if fields & {"context", "target"}:
        return "context_target"
    return "conll" if "entity" in fields else "labelled"


def _columns(form: Template, kind: str, settings: Instructions) -> dict[str, str]:
    """Where each field of the template stands in a record."""
    if unknown := [name for name in settings.columns if name not in form.fields]:
        raise ConfigError(
            [f"data.columns: {name} is no field of template {form.name}; {nearest(name, list(form.fields))}"
             for name in unknown]
        )  # fmt: skip
    return {name: settings.columns.get(name, FORMATS[kind].columns.get(name, name)) for name in form.fields}


def _check_columns(source: str, have: list[str], columns: Mapping[str, str]) -> None:
    optional = {"input"} if "instruction" in columns else set()
    missing = [
        f"{source}: no column {column!r} for {field}; columns: {', '.join(have)}. Name it with --data.columns "
        f"{field}=COLUMN."
        for field, column in columns.items()
        if column not in have and field not in optional
    ]
    if missing:
        raise ConfigError(missing)


def _from_record(
    record: Record, form: Template, columns: Mapping[str, str], meaning: Mapping[str, str], source: int
) -> Example:
    raw = {field: _text(record.values.get(column)) for field, column in columns.items()}
    label = None
    if form.labels:
        label = _label(raw["label"], form, meaning, record.where)
        raw["label"] = label
    answer = form.answer_of(raw)
    if not answer:
        raise ConfigError(f"{record.where}: the answer ({form.answer}) is empty; write one or remove the record.")
    made = form.render(raw)
    if not made.prompt:
        raise ConfigError(f"{record.where}: the prompt is empty; write one or remove the record.")
    return Example(
        made.prompt, form.separator + answer, made.key, source, record.where, made.cut, form.end, label
    )  # fmt: skip


def _label(raw: str, form: Template, meaning: Mapping[str, str], where: str) -> str:
    word = raw.strip().lower()
    label = meaning.get(word, word)
    if label not in form.labels:
        codes = "".join(f", {code} ({name})" for code, name in meaning.items())
        raise ConfigError(
            f"{where}: {raw!r} is no label of template {form.name}; it has {', '.join(form.labels)}{codes}. "
            "Correct the record, or name its format (FILE:FORMAT)."
        )
    return label


def _from_chat(record: Record, column: str, source: int) -> Example:
    messages = checked(record.values.get(column), record.where)
    said = [message["content"] for message in messages if message["role"] == "user"] or [messages[0]["content"] or ""]
    tools = record.values.get("tools") or None
    return Example("", "", said[0].strip(), source, record.where, (0, 0), messages=messages, tools=tools)


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def labels_of(sources: list[Source]) -> Iterator[str]:
    """Every label that some source's template has, once, in the templates' order."""
    yield from dict.fromkeys(label for source in sources for label in source.labels)
