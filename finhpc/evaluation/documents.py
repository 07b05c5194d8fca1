"""Examples of tasks, found in local files or on the hub, checked, and written as lm-eval reads them.

A task that ships with finhpc is one row of `SOURCES`. The financial ones, and tasks of the user's own, choose among the
labels in a file, with the prompts that finetuning uses for its records.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from finhpc.data.examples.records import read_records
from finhpc.data.examples.schema import FORMATS, Table, fields_of, guesses, open_sources
from finhpc.data.examples.tables import Reading, Record
from finhpc.data.examples.templates import Template, template
from finhpc.data.examples.values import each, is_missing, text_of, word_of
from finhpc.errors import ConfigError
from finhpc.settings.evaluate import EvaluateData

Document = dict[str, Any]  # an example as lm-eval reads it
TOKENS = 100  # per example, roughly, of tasks that do not state it
NAME = re.compile(r"[A-Za-z][\w-]*")
METRICS = """metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: f1
    aggregation: !function finhpc.evaluation.metrics.weighted_f1
    higher_is_better: true
"""


@dataclass(frozen=True)
class Source:
    """A task and where its examples come from. `files`: patterns of usual file names; `get`: where to fetch them.

    A financial task has a `format`, in which finetuning reads it. Other tasks have `columns`, the names that each
    column may have in a file, `document`, which makes a document of a record's values, and `lm_eval`, the path of
    lm-eval's own definition. `tokens`: per example, roughly, to start with the longest tasks.
    """

    files: tuple[str, ...]
    get: str
    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    document: Callable[[dict[str, Any], str], Document] | None = None
    format: str | None = None
    lm_eval: str = ""
    tokens: int = TOKENS


class Documents(NamedTuple):
    """Examples of a task, how many there are in total, and notes on what was guessed about them.

    `definition`: the task file for lm-eval, without the path of the examples.
    """

    rows: list[Document]
    total: int
    notes: list[str]
    definition: str


def find(task: str, data: EvaluateData) -> str:
    """Return the file, or hf:NAME, of a task. Raises `ConfigError` saying where to look and what to fetch."""
    source = SOURCES[task]
    if named := data.files.get(task):
        return named
    names = " or ".join(source.files)
    if data.folder is None:
        raise ConfigError(
            f"tasks={task} has no data; give --data.folder with a folder that holds {names}, or "
            f"--data.files.{task} with a file or hf:NAME. {source.get}"
        )
    folder = Path(data.folder).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"data.folder={folder} is not a folder; give the folder that holds the tasks' files.")
    folders = [folder, *(path for path in folder.iterdir() if path.is_dir())]
    paths = sorted({path for pattern in source.files for place in folders for path in place.glob(pattern)})
    if not paths:
        raise ConfigError(
            f"tasks={task}: no {names} in data.folder={folder} or the folders in it. {source.get} "
            f"Put it there, or give --data.files.{task}."
        )
    if len(paths) > 1:
        raise ConfigError(
            f"tasks={task}: several files match: {', '.join(map(str, paths))}; choose one with --data.files.{task}."
        )
    return str(paths[0])


def documents(task: str, data: EvaluateData, limit: int | None, seed: int) -> Documents:
    """Return at most `limit` examples of a task, drawn by `seed`, in the file's order.

    `task`: one of `SOURCES`, or of the user's own with a file in `data.files`. Raises `ConfigError` for missing data or
    columns, an empty set, and values that are not text or not a label of the task, each with its place.
    """
    source, spec = SOURCES.get(task), find(task, data) if task in SOURCES else data.files[task]
    if source is not None and source.format is None:
        reading = read_records(spec, data.encoding, data.hf_split)
        columns = _columns_in(reading, task, source)
        rows, notes = each(reading.records, lambda record: _document(source, columns, record)), reading.notes
        definition = _of_lm_eval(task, source.lm_eval)
    else:
        if source is not None:
            table, form = _financial_table(task, str(source.format), spec, data)
        else:
            table, form = _own_table(task, spec, data)

        # By place: lm-eval's reader would parse a label such as 2021-01-01 as a time.
        places = {label: place for place, label in enumerate(form.labels)}

        def document(record: Record) -> Document:
            fields = fields_of(record, table)[0]
            if source is not None:
                fields = stripped(fields)
            return {**fields, "prompt": form.render(fields).prompt, "answer": places[fields["label"]]}

        rows, notes = each(table.records, document), [*table.reading.notes, *guesses(table)]
        definition = _of_labels(task, form)
    if not rows:
        raise ConfigError(f"tasks={task}: {spec} has no examples; give a file with examples.")
    total = len(rows)
    if limit is not None:
        rows = [rows[place] for place in sorted(random.Random(seed).sample(range(total), min(limit, total)))]
    return Documents(rows, total, notes, definition)


def _of_labels(task: str, form: Template) -> str:
    """Return the task file of a choice among the labels of a template, whose prompts the documents hold."""
    definition = {
        "task": task,
        "dataset_path": "json",
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": list(form.labels),
        "doc_to_target": "answer",
        "target_delimiter": form.separator,
        "metadata": {"version": 1.0},
    }
    return yaml.safe_dump(definition) + METRICS


def _of_lm_eval(task: str, definition: str) -> str:
    """Return a task file that includes lm-eval's by its path, so that the functions it names are found next to it."""
    import lm_eval.tasks

    path = Path(lm_eval.tasks.__file__).parent / definition
    splits = {"training_split": None, "validation_split": None, "test_split": "test"}
    return f"include: {path}\n" + yaml.safe_dump({"task": task, "dataset_path": "json", "dataset_name": None, **splits})


def takes_labels(task: str, labels: Mapping[str, str]) -> bool:
    """Return whether `data.labels` can apply to a financial task: all of them are labels of the task."""
    format = SOURCES[task].format if task in SOURCES else None
    names = {name.lower() for name in labels.values()}
    return format is not None and names <= set(template(FORMATS[format].template).labels)


def stripped(fields: dict[str, str]) -> dict[str, str]:
    """Return the fields of a financial example without white space around them."""
    return {name: text.strip() for name, text in sorted(fields.items())}


def _financial_table(task: str, format: str, spec: str, data: EvaluateData) -> tuple[Table, Template]:
    """Return the records of a financial task and its template."""
    form = template(FORMATS[format].template)
    labels = data.labels if takes_labels(task, data.labels) else {}
    settings = data.model_copy(update={"template": None, "templates": None, "columns": {}, "labels": labels})
    (table,) = open_sources([spec], settings, format)
    if table.form is None or table.form.labels != form.labels or set(table.form.fields) != set(form.fields):
        raise ConfigError(
            f"tasks={task}: {spec} has the format {table.format}, without this task's "
            f"{', '.join(form.fields)}; give another file or format."
        )
    return table, form


def _own_table(task: str, spec: str, data: EvaluateData) -> tuple[Table, Template]:
    """Return the records of a task of the user's own and their template; its answers must be labels."""
    if not NAME.fullmatch(task):
        raise ConfigError(f"tasks={task} is not a name for a task of your own; use letters, digits, - and _.")
    (table,) = open_sources([spec], data)
    if table.form is None or table.meaning is None:
        raise ConfigError(
            f"tasks={task}: the answers of {spec} (format {table.format}) are text, but a task chooses among labels; "
            "give a file with a label, or name its column with --data.columns label=COLUMN."
        )
    return table, table.form.with_labels(table.meaning.labels)


def _columns_in(reading: Reading, task: str, source: Source) -> dict[str, str]:
    """Return the name that each column of a task has in a file."""
    columns = {
        column: next((name for name in names if name in reading.columns), "")
        for column, names in source.columns.items()
    }
    if missing := [column for column, name in columns.items() if not name]:
        wanted = "; ".join(f"{column} ({' or '.join(source.columns[column])})" for column in missing)
        raise ConfigError(
            f"tasks={task}: {reading.source} has no column for {wanted}; it has: {', '.join(reading.columns)}. Rename "
            f"the columns, or give another file with --data.files.{task}."
        )
    return columns


def _document(source: Source, columns: Mapping[str, str], record: Record) -> Document:
    values = {column: record.values.get(name) for column, name in columns.items()}
    if absent := [columns[column] for column, value in values.items() if is_missing(value)]:
        raise ConfigError(f"{record.where}: no value for {', '.join(absent)}; complete or remove the record.")
    assert source.document is not None
    return source.document({**record.values, **values}, record.where)


def _label(value: Any, labels: Mapping[str, str], where: str) -> str:
    label = labels.get(word_of(value, "the label", where).lower())
    if label is None:
        known = ", ".join(labels)
        raise ConfigError(f"{where}: the label {value!r} is not one of {known}; correct or remove the record.")
    return label


def _texts(values: dict[str, Any], names: tuple[str, ...], where: str) -> dict[str, str]:
    return {name: text_of(values.get(name), name, where) for name in names}


def _boolq(values: dict[str, Any], where: str) -> Document:
    """As in SuperGLUE, with the title before the passage."""
    labels = {"false": "0", "true": "1", "no": "0", "yes": "1", "0": "0", "1": "1"}
    texts = _texts(values, ("question", "title", "passage"), where)
    passage = f"{texts['title']} -- {texts['passage']}" if texts["title"] else texts["passage"]
    return {"question": texts["question"], "passage": passage, "label": int(_label(values["label"], labels, where))}


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
        tokens=70,
    ),
    "fiqa_sa": Source(
        ("fiqa*.json", "fiqa*.jsonl", "fiqa*.csv"),
        "Fetch FiQA task 1 (2018): JSON with a sentence and its sentiment_score.",
        format="fiqa",
        tokens=60,
    ),
    "tfns": Source(
        ("tfns*.csv", "sent_*.csv", "tfns*.jsonl"),
        "Fetch Twitter Financial News Sentiment: a CSV with text and label (0 bearish, 1 bullish, 2 neutral).",
        format="tfns",
        tokens=70,
    ),
    "ner": Source(
        ("FIN*.txt", "ner*.txt", "ner*.jsonl", "*.conll"),
        "Fetch the SEC-filings entities of Salinas Alvarado et al. (2015), CoNLL text with the tag in the last column.",
        format="conll",
        tokens=110,
    ),
    "boolq": Source(
        ("boolq*.jsonl", "boolq*.parquet"),
        "Fetch BoolQ (Clark et al. 2019): JSON lines of question, passage and answer; or hf:aps/super_glue:boolq.",
        {"question": ("question",), "passage": ("passage",), "label": ("label", "answer")},
        _boolq,
        lm_eval="super_glue/boolq/default.yaml",
        tokens=180,
    ),
    "piqa": Source(
        ("piqa*.jsonl", "piqa*.parquet"),
        "Fetch PIQA (Bisk et al. 2020): JSON lines of goal, sol1, sol2 and label; or hf:baber/piqa.",
        {"goal": ("goal",), "sol1": ("sol1",), "sol2": ("sol2",), "label": ("label",)},
        _piqa,
        lm_eval="piqa/piqa.yaml",
        tokens=80,
    ),
    "winogrande": Source(
        ("winogrande*.jsonl", "winogrande*.parquet"),
        "Fetch WinoGrande (Sakaguchi et al. 2020): JSON lines of sentence, option1, option2 and answer; or "
        "hf:allenai/winogrande:winogrande_xl.",
        {name: (name,) for name in ("sentence", "option1", "option2", "answer")},
        _winogrande,
        lm_eval="winogrande/default.yaml",
        tokens=60,
    ),
}
