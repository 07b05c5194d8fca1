"""A journal's records as MLflow's metrics and tags."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from finhpc.tracking.tags import PREFIX
from finhpc.training.journal import Record

if TYPE_CHECKING:
    from mlflow.entities import Metric

METRIC_KINDS = {"train", "eval", "memory", "system"}
LEADING = ("val_loss", "train_loss")  # logged before all others: MLflow's comparison opens with the first metric


def translate(
    records: list[Record], last_step: Mapping[str, int], kinds: set[str] = METRIC_KINDS
) -> tuple[list[Metric], dict[str, str], dict[str, int]]:
    """Return the records' metrics, the leading ones of a record first; their tags; and each metric's newest step.

    A metric's step that was sent before (up to `last_step`) is left out: the first value of a repeated step stays.
    """
    from mlflow.entities import Metric

    metrics: list[Metric] = []
    tags: dict[str, str] = {}
    newest: dict[str, int] = {}
    for record in records:
        if record["kind"] == "start":
            tags |= {f"{PREFIX}start.{key}": value for key, value in record.items() if key not in ("kind", "time")}
        if record["kind"] not in kinds:
            continue
        for key, value in leading_first(numbers(record)):
            if record["step"] <= newest.get(key, last_step.get(key, -1)):
                continue
            if not math.isfinite(value):  # MLflow would store infinity as 1.8e308
                tags["finhpc.not_finite"] = f"{key} at step {record['step']}: {value}"
                continue
            metrics.append(Metric(key, float(value), round(record["time"] * 1000), record["step"]))
            newest[key] = record["step"]
    return metrics, tags, newest


def numbers(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Name and value of every number in a record; a list has one per worker."""
    prefix = "system/" if record.get("kind") == "system" else ""
    for key, value in record.items():
        if key in ("kind", "time", "step"):
            continue
        many = isinstance(value, list)
        for index, item in enumerate(value if many else [value]):
            if isinstance(item, int | float) and not isinstance(item, bool):
                yield f"{prefix}{key}_worker{index}" if many else f"{prefix}{key}", item


def leading_first(metrics: Iterable[tuple[str, float]]) -> list[tuple[str, float]]:
    return sorted(metrics, key=lambda item: LEADING.index(item[0]) if item[0] in LEADING else len(LEADING))
