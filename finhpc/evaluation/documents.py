"""The examples of each task: found among local files or on the hub, checked, and made lm-eval's columns."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from finhpc.data.examples.problems import each
from finhpc.data.examples.records import Reading, Record, read_records
from finhpc.data.examples.schema import FORMATS, Table, fields_of, guesses, open_sources
from finhpc.data.examples.templates import template
from finhpc.data.examples.values import is_missing, text_of, word_of
from finhpc.errors import ConfigError
from finhpc.settings.evaluate import EvaluateData

Document = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """Where a task's examples come from. `files`: patterns of usual names; `get`: where to fetch them.

    `format`: of a financial task, as finetuning reads it. Of other tasks, `columns`: for each column the names it may
    have in a file, and `document`: what lm-eval reads, made of a record's values.
    """

    files: tuple[str, ...]
    get: str
    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    document: Callable[[dict[str, Any], str], Document] | None = None
    format: str | None = None


def find(task: str, data: EvaluateData) -> str:
    """The file, or hf:NAME, of a task; raises `ConfigError` saying where it was looked for and what to fetch."""
    source = SOURCES[task]
    if named := data.files.get(task):
        return named
    if data.folder is None:
        raise ConfigError(
            f"tasks={task} has no data; give --data.folder with a folder that holds {' or '.join(source.files)}, or "
            f"--data.files.{task} with a file or hf:NAME. {source.get}"
        )
    folder = Path(data.folder).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"data.folder={folder} is no folder; give the folder that holds the tasks' files.")
    found = sorted({path for name in source.files for at in (folder, *_below(folder)) for path in at.glob(name)})
    if not found:
        raise ConfigError(
            f"tasks={task}: no {' or '.join(source.files)} in data.folder={folder} or the folders in it. {source.get} "
            f"Put it there, or give --data.files.{task}."
        )
    if len(found) > 1:
        raise ConfigError(
            f"tasks={task}: several files would do: {', '.join(map(str, found))}; choose one with --data.files.{task}."
        )
    return str(found[0])


class Documents(NamedTuple):
    """Examples of a task, how many there are in all, and what was guessed about them."""

    rows: list[Document]
    total: int
    notes: list[str]


def documents(task: str, data: EvaluateData, limit: int | None, seed: int) -> Documents:
    """Return at most `limit` examples of a task, drawn by `seed`, in the file's order.

    Raises `ConfigError` for missing data or columns, an empty set, and values that are not text or not a label of the
    task, each with its place.
    """
    source, spec = SOURCES[task], find(task, data)
    if source.format is not None:
        table = _finance_table(task, source.format, spec, data)
        rows = each(table.records, lambda record: _stripped(fields_of(record, table)))
        notes = [*table.reading.notes, *guesses(table)]
    else:
        reading = read_records(spec, data.encoding, data.hf_split)
        present = _present_columns(task, source, reading)
        table = Table(reading, list(reading.records), "", False, False, None, {})
        rows = each(table.records, lambda record: _document(source, present, record))
        notes = reading.notes
    if not rows:
        raise ConfigError(f"tasks={task}: {spec} holds no example; give a file that does.")
    return Documents(drawn(rows, limit, seed), len(rows), notes)


def takes_labels(task: str, labels: Mapping[str, str]) -> bool:
    """Whether `data.labels` can be what the values of a financial task mean: all are labels of the task."""
    format = SOURCES[task].format if task in SOURCES else None
    names = {name.lower() for name in labels.values()}
    return format is not None and names <= set(template(FORMATS[format].template).labels)


def _finance_table(task: str, format: str, spec: str, data: EvaluateData) -> Table:
    """The records of a financial task, read as finetuning reads them."""
    form = template(FORMATS[format].template)
    fits = takes_labels(task, data.labels)
    settings = data.model_copy(
        update={"template": None, "templates": None, "columns": {}, "labels": data.labels if fits else {}}
    )
    (table,) = open_sources([spec], settings, format)
    if table.form is None or table.form.labels != form.labels or set(table.form.fields) != set(form.fields):
        raise ConfigError(
            f"tasks={task}: {spec} is of the format {table.format}, which does not hold this task's "
            f"{', '.join(form.fields)}; give another file or format."
        )
    return table


def _stripped(found: tuple[dict[str, str], str | None]) -> Document:
    return {name: text.strip() for name, text in sorted(found[0].items())}


def _present_columns(task: str, source: Source, reading: Reading) -> dict[str, str]:
    present = {column: _present(names, reading.columns) for column, names in source.columns.items()}
    if missing := [column for column, name in present.items() if name is None]:
        wanted = "; ".join(f"{column} ({' or '.join(source.columns[column])})" for column in missing)
        raise ConfigError(
            f"tasks={task}: {reading.source} has no column for {wanted}; it has: {', '.join(reading.columns)}. Rename "
            f"the columns, or give another file with --data.files.{task}."
        )
    return {column: name for column, name in present.items() if name is not None}


def drawn(rows: list[Document], limit: int | None, seed: int) -> list[Document]:
    """At most `limit` examples, drawn by `seed`, in their order."""
    return rows if limit is None else [rows[i] for i in sorted(_sample(len(rows), limit, seed))]


def _sample(n: int, limit: int, seed: int) -> list[int]:
    return random.Random(seed).sample(range(n), min(limit, n))


def _below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())


def _present(names: tuple[str, ...], columns: list[str]) -> str | None:
    return next((name for name in names if name in columns), None)


def _document(source: Source, present: Mapping[str, str], record: Record) -> Document:
    values = {column: record.values.get(name) for column, name in present.items()}
    if absent := [present[column] for column, value in values.items() if is_missing(value)]:
        raise ConfigError(f"{record.where}: no value for {', '.join(absent)}; complete or remove the record.")
    assert source.document is not None
    return source.document({**record.values, **values}, record.where)


def _label(value: Any, known: Mapping[str, str], where: str) -> str:
    found = known.get(word_of(value, "the label", where).lower())
    if found is None:
        raise ConfigError(f"{where}: the label {value!r} is none of {', '.join(known)}; correct or remove the record.")
    return found


def _texts(values: dict[str, Any], names: tuple[str, ...], where: str) -> dict[str, str]:
    return {name: text_of(values.get(name), name, where) for name in names}


def _boolq(values: dict[str, Any], where: str) -> Document:
    """As in SuperGLUE, where the title stands before the passage."""
    known = {"false": "0", "true": "1", "no": "0", "yes": "1", "0": "0", "1": "1"}
    texts = _texts(values, ("question", "title", "passage"), where)
    passage = f"{texts['title']} -- {texts['passage']}" if texts["title"] else texts["passage"]
    return {"question": texts["question"], "passage": passage, "label": int(_label(values["label"], known, where))}


def _piqa(values: dict[str, Any], where: str) -> Document:
    label = int(_label(values["label"], {"0": "0", "1": "1"}, where))
    return _texts(values, ("goal", "sol1", "sol2"), where) | {"label": label}


def _winogrande(values: dict[str, Any], where: str) -> Document:
    texts = _texts(values, ("sentence", "option1", "option2"), where)
    if "_" not in texts["sentence"]:
        raise ConfigError(f"{where}: the sentence has no _ to fill in; correct or remove the record.")
    return texts | {"answer": _label(values["answer"], {"1": "1", "2": "2"}, where)}


SOURCES: dict[str, Source] = {
    "fpb": Source(
        ("fpb*.txt", "*hrase*ank*.txt", "Sentences_*.txt", "fpb*.jsonl", "fpb*.csv"),
        "Fetch Financial PhraseBank (Malo et al. 2014), a text file of sentence@label.",
        format="phrasebank",
    ),
    "fiqa_sa": Source(
        ("fiqa*.json", "fiqa*.jsonl", "fiqa*.csv"),
        "Fetch FiQA task 1 (2018): JSON with a sentence and its sentiment_score.",
        format="fiqa",
    ),
    "tfns": Source(
        ("tfns*.csv", "sent_*.csv", "tfns*.jsonl"),
        "Fetch Twitter Financial News Sentiment: a CSV with text and label (0 bearish, 1 bullish, 2 neutral).",
        format="tfns",
    ),
    "ner": Source(
        ("FIN*.txt", "ner*.txt", "ner*.jsonl", "*.conll"),
        "Fetch the SEC-filings entities of Salinas Alvarado et al. (2015), CoNLL text with the tag in the last column.",
        format="conll",
    ),
    "boolq": Source(
        ("boolq*.jsonl", "boolq*.parquet"),
        "Fetch BoolQ (Clark et al. 2019): JSON lines of question, passage and answer; or hf:aps/super_glue:boolq.",
        {"question": ("question",), "passage": ("passage",), "label": ("label", "answer")},
        _boolq,
    ),
    "piqa": Source(
        ("piqa*.jsonl", "piqa*.parquet"),
        "Fetch PIQA (Bisk et al. 2020): JSON lines of goal, sol1, sol2 and label; or hf:baber/piqa.",
        {"goal": ("goal",), "sol1": ("sol1",), "sol2": ("sol2",), "label": ("label",)},
        _piqa,
    ),
    "winogrande": Source(
        ("winogrande*.jsonl", "winogrande*.parquet"),
        "Fetch WinoGrande (Sakaguchi et al. 2020): JSON lines of sentence, option1, option2 and answer; or "
        "hf:allenai/winogrande:winogrande_xl.",
        {name: (name,) for name in ("sentence", "option1", "option2", "answer")},
        _winogrande,
    ),
}
