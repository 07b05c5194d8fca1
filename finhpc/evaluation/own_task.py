"""A user's own task: choose among the labels in a file, with the prompts that finetuning uses for its records."""

from __future__ import annotations

import re

import yaml

from finhpc.data.examples.schema import fields_of, guesses, open_sources
from finhpc.data.examples.values import each
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


def own_task(name: str, data: EvaluateData, limit: int | None, seed: int) -> tuple[str, Documents]:
    """Return the task file of `data.files.NAME`, without the path of its examples, and the examples.

    Raises `ConfigError` for a file whose answers are not labels.
    """
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

    # By place: lm-eval's reader would parse a label such as 2021-01-01 as a time.
    places = {label: place for place, label in enumerate(meaning.labels)}
    rows: list[Document] = [
        {"prompt": form.render(raw).prompt, "label": label, "answer": places[str(label)]}
        for raw, label in each(table.records, lambda record: fields_of(record, table))
    ]
    notes = [*table.reading.notes, *guesses(table)]
    examples = drawn(name, spec, rows, notes, limit, seed)
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
    return yaml.safe_dump(definition) + METRICS, examples
