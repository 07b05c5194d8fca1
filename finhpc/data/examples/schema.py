"""`open_sources`: find the format of each source, the columns of its template's fields, and what its labels mean."""

from __future__ import annotations

import fnmatch
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import NamedTuple, Protocol

from finhpc.data.examples import labels
from finhpc.data.examples.labels import Meaning
from finhpc.data.examples.messages import SIDES
from finhpc.data.examples.records import read_records, split_name
from finhpc.data.examples.tables import Reading, Record
from finhpc.data.examples.templates import LABELS, Template, template
from finhpc.data.examples.values import each, text_of, word_of
from finhpc.errors import ConfigError, collect
from finhpc.settings.base import nearest


class Format(NamedTuple):
    """A template, the names that each field's column may have, and what codes and other words for labels mean."""

    template: str
    columns: dict[str, tuple[str, ...]]
    codes: Mapping[str, str] = MappingProxyType({})
    words: Mapping[str, str] = MappingProxyType({})


INPUT = ("sentence", "text", "input")
LABEL = ("label", "sentiment", "output")
MESSAGES = ("messages", "conversations", "conversation")
FORMATS = {
    "phrasebank": Format(
        "phrasebank", {"input": INPUT, "label": LABEL}, {"0": "negative", "1": "neutral", "2": "positive"}
    ),
    "tfns": Format(
        "tfns",
        {"input": ("text", "sentence", "input"), "label": LABEL},
        {"0": "negative", "1": "positive", "2": "neutral"},
        {"bearish": "negative", "bullish": "positive"},
    ),
    "fiqa": Format("fiqa", {"input": INPUT, "label": LABEL}),
    "conll": Format("ner", {"input": INPUT, "entity": ("entity",), "label": LABEL}),
    "alpaca": Format("alpaca", {}),
    "context_target": Format("context_target", {"context": ("context", "prompt"), "target": ("target", "completion")}),
    "labelled": Format("phrasebank", {"input": INPUT, "label": LABEL[:2]}),
    "chat": Format("", {"messages": MESSAGES}),
    "preference": Format("", {"prompt": ("prompt", "question", "instruction"), **{side: (side,) for side in SIDES}}),
}
BY_COLUMNS = (  # formats that are known by columns of these names
    ("preference", set(SIDES)),
    ("alpaca", {"instruction", "output"}),
    ("context_target", {"context", "target"}),
    ("context_target", {"prompt", "completion"}),
    ("conll", {"sentence", "entity", "label"}),
)
SHOWN = 20  # columns named in a message
OWN_LABELS = "classify"  # the template for labels of the user's own
# File names of Twitter Financial News Sentiment, in which codes have its meaning.
TFNS_FILES = ("tfns*", "sent_train.csv", "sent_valid.csv", "*twitter-financial-news-sentiment*")


class RecordSettings(Protocol):
    """The settings that say how records are read, for finetuning and evaluation."""

    template: str | None
    templates: str | None
    columns: dict[str, str]
    labels: dict[str, str]
    encoding: str | None
    hf_split: str


@dataclass
class Table:
    """A source whose records are read and checked, but not rendered.

    `named`: the user named the format; `guessed`: neither the user nor the command did. `form`: its template, None for
    conversations and pairs. `columns`: the column of each field. `words`: how often each label occurs, as written.
    """

    reading: Reading
    format: str
    named: bool
    guessed: bool
    form: Template | None
    columns: dict[str, str]
    words: Counter[str] = field(default_factory=Counter)
    meaning: Meaning | None = None

    @property
    def source(self) -> str:
        return self.reading.source

    @property
    def records(self) -> list[Record]:
        return self.reading.records


def open_sources(sources: Iterable[str], settings: RecordSettings, format: str | None = None) -> list[Table]:
    """Read all sources and find what their labels mean; sources that share a label share all labels.

    `format`: of all sources whose own is not named. Raises one `ConfigError` with every problem of all sources.
    """
    opened: list[Table] = []
    problems: list[str] = []
    for spec in sources:
        with collect(problems):
            opened.append(_open(spec, settings, format))
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    _check_used(opened, settings)
    for table in opened:
        with collect(problems):
            _settle(table, settings)
    if problems:
        raise ConfigError(problems)
    own = [table for table in opened if table.form is not None and table.form.chooses and not table.form.labels]
    for table, meaning in zip(own, labels.united([table.meaning for table in own if table.meaning]), strict=True):
        assert table.form is not None
        table.form, table.meaning = table.form.with_labels(meaning.labels), meaning
    return opened


def fields_of(record: Record, table: Table) -> tuple[dict[str, str], str | None]:
    """Return the text of each field of a record, and its label if its template chooses among labels.

    Raises `ConfigError` with the record's place for a value that is missing, is not text or is not a label.
    """
    assert table.form is not None
    form, raw = table.form, {}
    for name, column in table.columns.items():
        if form.chooses and name == "label":
            continue
        raw[name] = text_of(record.values.get(column), column, record.where)
        if not raw[name].strip() and not (name == "input" and form.without_input):
            what = "answer" if f"{{{name}}}" not in form.prompt else f"prompt's {name}"
            raise ConfigError(f"{record.where}: the {what} ({column}) is empty; write one or remove the record.")
    if not form.chooses:
        return raw, None
    raw["label"] = _label(record, table)
    return raw, raw["label"]


def _open(spec: str, settings: RecordSettings, format: str | None) -> Table:
    path, named = split_name(spec, FORMATS)
    reading = read_records(path, settings.encoding, settings.hf_split, named or format)
    kind = named or format or _detect(reading, settings)
    name = settings.template or FORMATS[kind].template
    form = template(name, settings.templates) if FORMATS[kind].template else None
    guessed = (named or format or "labelled") == "labelled"
    table = Table(reading, kind, named is not None, guessed, form, _columns(form, kind, reading, settings))
    if form is not None and form.chooses:
        for word in each(table.records, partial(_word, table=table)):
            table.words[word] += word != ""
    return table


def _detect(reading: Reading, settings: RecordSettings) -> str:
    """Return the format that the file proves, or the one whose columns it has."""
    have = set(reading.columns)
    if not have:
        raise ConfigError(f"data.source={reading.source} has no examples; give a file with records.")
    if reading.format:
        return reading.format
    if fields := set(settings.columns):
        by_field = (("chat", {"messages"}), ("preference", set(SIDES)), ("alpaca", {"instruction", "output"}),
                    ("context_target", {"context", "target"}), ("conll", {"entity"}))  # fmt: skip
        return next((kind for kind, names in by_field if names & fields), "labelled")
    kind = next((kind for kind, needed in BY_COLUMNS if needed <= have), None)
    if kind != "preference" and have & set(MESSAGES):
        return "chat"
    if kind:
        return kind
    if have & set(INPUT) and have & set(FORMATS["labelled"].columns["label"]):
        if {"text", "label"} <= have and _is_tfns(reading.source):
            return "tfns"
        return "phrasebank" if {"sentence", "label"} <= have else "labelled"
    if settings.template:
        return "labelled" if template(settings.template, settings.templates).chooses else "context_target"
    above = " If these are a record, write a first line with the columns' names above it."
    raise ConfigError(
        f"{reading.source}: its columns ({_listed(reading.columns)}) match no known format; name the format "
        f"(FILE:FORMAT, one of {', '.join(FORMATS)}), or the columns that hold its fields with --data.columns, such as "
        "input=COLUMN label=COLUMN." + (above if reading.source.lower().endswith((".csv", ".tsv")) else "")
    )


def _listed(columns: list[str]) -> str:
    more = f", and {len(columns) - SHOWN:,} more" if len(columns) > SHOWN else ""
    return ", ".join(columns[:SHOWN]) + more


def _is_tfns(source: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for name in (os.path.basename(source), source) for pattern in TFNS_FILES)


def _columns(form: Template | None, kind: str, reading: Reading, settings: RecordSettings) -> dict[str, str]:
    """Return the column of each field of the template. Raises `ConfigError` for missing columns."""
    fields = form.fields if form else tuple(FORMATS[kind].columns)
    if unknown := [name for name in settings.columns if name not in fields]:
        what = f"template {form.name}" if form else f"the format {kind}"
        raise ConfigError([f"data.columns: {name} is not a field of {what}; {nearest(name, list(fields))}"
                           for name in unknown])  # fmt: skip
    found: dict[str, str] = {}
    missing: list[str] = []
    for name in fields:
        usual = FORMATS[kind].columns.get(name, (name,))
        wanted = (settings.columns[name],) if name in settings.columns else usual
        column = next((column for column in wanted if column in reading.columns), None)
        if column is not None:
            found[name] = column
        elif name == "input" and form is not None and form.without_input and name not in settings.columns:
            found[name] = name  # it is empty in every record
        elif kind == "preference" and name == "prompt" and name not in settings.columns:
            continue  # conversations begin with it
        else:
            missing.append(
                f"{reading.source}: no column {' or '.join(map(repr, wanted))} for {name}; columns: "
                f"{_listed(reading.columns)}. Name it with --data.columns {name}=COLUMN."
            )
    if missing:
        raise ConfigError(missing)
    return found


def _check_used(opened: list[Table], settings: RecordSettings) -> None:
    """Raise `ConfigError` for settings that apply to no source."""
    problems = []
    if settings.template and all(table.form is None for table in opened):
        problems.append(
            f"data.template={settings.template} is not for conversations, which the tokenizer's chat template renders, "
            "and pairs; leave it out."
        )
    if settings.labels and not any(table.form is not None and table.form.chooses for table in opened):
        problems.append("data.labels is given, but the answers of all sources are text; leave it out.")
    if problems:
        raise ConfigError(problems)


def _settle(table: Table, settings: RecordSettings) -> None:
    """Find what each label of a source means, and the template of a source whose format was guessed.

    A template with labels from the data has none until those of all sources are known.
    """
    if (form := table.form) is None or not form.chooses:
        return
    kind = FORMATS[table.format]
    coded = table.named or (table.format == "tfns" and _is_tfns(table.source))
    free = table.guessed and settings.template is None and table.reading.format is None and table.format != "conll"
    if settings.labels:
        _settle_given(table, form, free, coded, settings)
        return
    if free and table.words and {word.lower() for word in table.words} <= {*FORMATS["tfns"].words, "neutral"}:
        table.format, kind = "tfns", FORMATS["tfns"]
        form = table.form = template(kind.template)
    known = labels.of_words(form.labels, {**kind.words, **(kind.codes if coded else {})})
    strange = [word for word in table.words if word.lower() not in known.of]
    are_of_data = not form.labels or (strange and free)
    if are_of_data or not coded:
        labels.refuse_codes(table.source, strange, {name: f.codes for name, f in FORMATS.items() if f.codes})
    if are_of_data:
        table.form = form if not form.labels else template(OWN_LABELS)
        table.meaning = labels.of_data(table.source, table.words)
    else:
        table.meaning = known


def _settle_given(table: Table, form: Template, free: bool, coded: bool, settings: RecordSettings) -> None:
    meaning = labels.given(settings.labels)
    codes = FORMATS[table.format].codes if coded else {}
    if code := next((code for code, label in codes.items() if meaning.of.get(code, label).lower() != label), None):
        raise ConfigError(
            f"data.labels says that {code} is {meaning.of[code]}, but in {table.source}, of format {table.format}, it "
            f"is {codes[code]}; remove data.labels, or name the file {table.source}:labelled if it is another set."
        )
    names = {name.lower() for name in meaning.labels}
    if form.labels and names <= set(form.labels):
        kept = form.labels if names == set(form.labels) or not table.guessed else [n for n in form.labels if n in names]
        table.form = form.with_labels(tuple(kept))
        table.meaning = labels.of_words(kept, {word: name.lower() for word, name in meaning.of.items()})
        return
    if free and form.labels:
        form = template(OWN_LABELS)
    if form.labels and f"{{{LABELS}}}" not in form.prompt:
        raise ConfigError(
            f"data.labels ({', '.join(meaning.labels)}) are other labels than template {form.name} names in its prompt "
            f"({', '.join(form.labels)}); use a template with {{labels}}, such as --data.template {OWN_LABELS}."
        )
    table.form, table.meaning = form.with_labels(meaning.labels), meaning


def _word(record: Record, table: Table) -> str:
    return word_of(record.values.get(table.columns["label"]), table.columns["label"], record.where)


def _label(record: Record, table: Table) -> str:
    assert table.meaning is not None
    word = _word(record, table)
    if not word:
        raise ConfigError(
            f"{record.where}: the label ({table.columns['label']}) is empty; write one or remove the record."
        )
    if (label := table.meaning.of.get(word.lower())) is None:
        form, others = table.form, [code for code in table.meaning.of if code not in table.meaning.labels]
        codes = "".join(f", {code} ({table.meaning.of[code]})" for code in others)
        raise ConfigError(
            f"{record.where}: {word!r} is not a label of template {form.name if form else ''}; it has "
            f"{', '.join(table.meaning.labels)}{codes}. Correct the record, or list the labels with --data.labels."
        )
    return label


def guesses(table: Table) -> list[str]:
    """Return the line that reports what was guessed: format, template, and the meaning of labels."""
    columns = list(dict.fromkeys(table.columns.values()))
    if table.form is None:  # read with the messages, see `finhpc.data.examples.messages`
        columns += [name for name in ("system", "tools") if name in table.reading.columns]
    used = ", ".join(columns)
    if unused := [name for name in table.reading.columns if name not in columns]:
        used += f"; not used: {', '.join(unused[:10])}"
    guess = f"{table.source}: read as {table.format} (columns {used})" + (
        f", template {table.form.name}" if table.form else ""
    )
    if table.meaning is not None:
        return [f"{guess}; {table.meaning.note(table.words)}"]
    return [guess] if table.guessed else []
