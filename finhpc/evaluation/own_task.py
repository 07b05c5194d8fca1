"""A task of the user's own: choosing among the labels of a file, with the prompts that finetuning gives its records."""

from __future__ import annotations

import re
from typing import NamedTuple

import yaml

from finhpc.data.examples.problems import each
from finhpc.data.examples.schema import fields_of, guesses, open_sources
from finhpc.errors import ConfigError
from finhpc.evaluation.documents import Document, Documents, drawn
from finhpc.settings.evaluate import EvaluateData

NAME = re.compile(r"[A-Za-z][\w-]*")
METRICS = """metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: f1
    aggregation: !function finhpc.evaluation.metrics.weighted_f1
    higher_is_better: true
"""


class OwnTask(NamedTuple):
    """The task file without the place of its examples, and the examples."""

    definition: str
    documents: Documents


def own_task(name: str, data: EvaluateData, limit: int | None, seed: int) -> OwnTask:
    """Make a task of `data.files.NAME`; raises `ConfigError` for a file whose answers are not labels."""
    if not NAME.fullmatch(name):
        raise ConfigError(f"tasks={name} is not a name for a task of your own; use letters, digits, - and _.")
    spec = data.files[name]
    (table,) = open_sources([spec], data)
    form, meaning = table.form, table.meaning
    if form is None or meaning is None:
        raise ConfigError(
            f"tasks={name}: the answers of {spec} (format {table.format}) are text, but a task chooses among labels; "
            "give a file with a label, or name its column with --data.columns label=COLUMN."
        )

    def documents() -> list[Document]:
        fields = each(table.records, lambda record: fields_of(record, table))
        # By its place: lm-eval's reader makes a time of a label such as 2021-01-01.
        places = {label: place for place, label in enumerate(meaning.labels)}
        return [
            {"prompt": form.render(raw).prompt, "label": label, "answer": places[str(label)]} for raw, label in fields
        ]

    rows = documents()
    if not rows:
        raise ConfigError(f"tasks={name}: {spec} holds no example; give a file that does.")
    definition = {
        "task": name,
        "dataset_path": "json",
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": list(meaning.labels),
        "doc_to_target": "answer",
        "target_delimiter": form.separator,
        "metadata": {"version": 1.0},
    }
    notes = [*table.reading.notes, *guesses(table)]
    return OwnTask(yaml.safe_dump(definition) + METRICS, Documents(drawn(rows, limit, seed), len(rows), notes))
