"""The examples of each task: found among local files or on the hub, checked, and made lm-eval's columns."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finhpc.config import EvaluateData
from finhpc.data.records import Record, read_records, split_name
from finhpc.data.templates import template
from finhpc.errors import ConfigError, DataError

Document = dict[str, Any]
Labels = tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """Where a task's examples come from. `files`: patterns of usual names; `get`: where to fetch them.

    `columns`: for each column of the task, the names it may have in a file. `document` makes what
    lm-eval reads of a record's values. `format`: how a text file is read.
    """

    files: tuple[str, ...]
    get: str
    columns: Mapping[str, tuple[str, ...]]
    document: Callable[[dict[str, Any], str], Document]
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
    folder = Path(data.folder)
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


def documents(task: str, data: EvaluateData, limit: int | None, seed: int) -> tuple[list[Document], int]:
    """At most `limit` examples of a task, drawn by `seed`, in the file's order, and how many there are in all.

    Raises `ConfigError` for missing data or columns and an empty set, `DataError` for a label that no
    task knows, naming its place.
    """
    source = SOURCES[task]
    path, name = split_name(find(task, data), ("phrasebank", "conll"))
    reading = read_records(path, data.encoding, data.hf_split, name or source.format)
    records = list(reading.records)
    if not records:
        raise ConfigError(f"tasks={task}: {path} holds no example; give a file that does.")
    present = {column: _present(names, reading.columns) for column, names in source.columns.items()}
    if missing := [column for column, name in present.items() if name is None]:
        wanted = "; ".join(f"{column} ({' or '.join(source.columns[column])})" for column in missing)
        raise ConfigError(
            f"tasks={task}: {path} has no column for {wanted}; it has: {', '.join(reading.columns)}. Rename the "
            f"columns, or give another file with --data.files.{task}."
        )
    rows = range(len(records)) if limit is None else sorted(_sample(len(records), limit, seed))
    return [_document(source, present, records[row]) for row in rows], len(records)


def _sample(n: int, limit: int, seed: int) -> list[int]:
    return random.Random(seed).sample(range(n), min(limit, n))


def _below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())


def _present(names: tuple[str, ...], columns: list[str]) -> str | None:
    return next((name for name in names if name in columns), None)


def _document(source: Source, present: Mapping[str, str | None], record: Record) -> Document:
    values = {column: record.values.get(name) for column, name in present.items() if name is not None}
    if absent := [present[column] for column, value in values.items() if value is None]:
        raise DataError(f"{record.where}: no value for {', '.join(map(str, absent))}; complete or remove the record.")
    extra = {key: value for key, value in record.values.items() if key not in present.values()}
    return source.document(extra | values, record.where)


def _label(value: Any, known: Mapping[str, str], where: str) -> str:
    found = known.get(str(value).strip().lower())
    if found is None:
        raise DataError(f"{where}: the label {value!r} is none of {', '.join(known)}; correct or remove the record.")
    return found


def _finance(name: str, others: Mapping[str, str]) -> Callable[[dict[str, Any], str], Document]:
    columns = {"input", "entity"} & set(template(name).fields)
    known = {label: label for label in template(name).labels} | dict(others)

    def document(values: dict[str, Any], where: str) -> Document:
        return {column: str(values[column]).strip() for column in sorted(columns)} | {
            "label": _label(values["label"], known, where)
        }

    return document


def _boolq(values: dict[str, Any], where: str) -> Document:
    """As in SuperGLUE, where the title stands before the passage."""
    known = {"false": "0", "true": "1", "no": "0", "yes": "1", "0": "0", "1": "1"}
    title = values.get("title")
    passage = f"{title} -- {values['passage']}" if title else str(values["passage"])
    return {"question": values["question"], "passage": passage, "label": int(_label(values["label"], known, where))}


def _piqa(values: dict[str, Any], where: str) -> Document:
    label = int(_label(values["label"], {"0": "0", "1": "1"}, where))
    return {"goal": values["goal"], "sol1": values["sol1"], "sol2": values["sol2"], "label": label}


def _winogrande(values: dict[str, Any], where: str) -> Document:
    if "_" not in str(values["sentence"]):
        raise DataError(f"{where}: the sentence has no _ to fill in; correct or remove the record.")
    answer = _label(values["answer"], {"1": "1", "2": "2"}, where)
    return {column: values[column] for column in ("sentence", "option1", "option2")} | {"answer": answer}


SENTIMENT = {"input": ("sentence", "text", "input"), "label": ("label", "sentiment", "output")}
MOODS = {"bearish": "negative", "bullish": "positive"}
SOURCES: dict[str, Source] = {
    "fpb": Source(
        ("fpb*.txt", "*hrase*ank*.txt", "Sentences_*.txt", "fpb*.jsonl", "fpb*.csv"),
        "Fetch Financial PhraseBank (Malo et al. 2014), a text file of sentence@label.",
        SENTIMENT,
        _finance("phrasebank", {}),
        "phrasebank",
    ),
    "fiqa_sa": Source(
        ("fiqa*.json", "fiqa*.jsonl", "fiqa*.csv"),
        "Fetch FiQA task 1 (2018): JSON with a sentence and its sentiment_score.",
        SENTIMENT,
        _finance("fiqa", {}),
    ),
    "tfns": Source(
        ("tfns*.csv", "sent_*.csv", "tfns*.jsonl"),
        "Fetch Twitter Financial News Sentiment: a CSV with text and label (0 bearish, 1 bullish, 2 neutral).",
        SENTIMENT,
        _finance("tfns", MOODS | {"0": "negative", "1": "positive", "2": "neutral"}),
    ),
    "ner": Source(
        ("FIN*.txt", "ner*.txt", "ner*.jsonl", "*.conll"),
        "Fetch the SEC-filings entities of Salinas Alvarado et al. (2015), CoNLL text with the tag in the last column.",
        {"input": ("sentence", "input"), "entity": ("entity",), "label": ("label", "output")},
        _finance("ner", {}),
        "conll",
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
