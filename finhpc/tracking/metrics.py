"""A journal's records as MLflow has them: metrics of a step, and tags."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from finhpc.files import redact
from finhpc.tracking.shown import HIDDEN, in_front
from finhpc.training.journal import Record

if TYPE_CHECKING:
    from mlflow.entities import Metric

METRIC_KINDS = {"train", "eval", "memory", "system"}


def translate(
    records: list[Record], last_step: Mapping[str, int], kinds: set[str] = METRIC_KINDS
) -> tuple[list[Metric], dict[str, str], dict[str, int]]:
    """Records as metrics and tags, and the newest step of each metric.

    A step that a metric already has is left out: the first telling of a repeated step stands. The leading metrics of
    a record come first.
    """
    from mlflow.entities import Metric

    metrics: list[Metric] = []
    tags: dict[str, str] = {}
    newest: dict[str, int] = {}
    for record in records:
        if record["kind"] == "start":
            told = {key: value for key, value in record.items() if key not in ("kind", "time")}
            tags |= {f"{HIDDEN}start.{key}": redact(str(value)) for key, value in told.items()}
        if record["kind"] not in kinds:
            continue
        for key, value in in_front(numbers(record)):
            if record["step"] <= newest.get(key, last_step.get(key, -1)):
                continue
            if not math.isfinite(value):  # MLflow would store infinity as 1.8e308
                tags["finhpc.not_finite"] = f"{key} at step {record['step']}: {value}"
                continue
            metrics.append(Metric(key, float(value), round(record["time"] * 1000), record["step"]))
            newest[key] = record["step"]
    return metrics, tags, newest


def numbers(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Name and value of every number in a record; a list holds one a worker."""
    prefix = "system/" if record.get("kind") == "system" else ""
    for key, value in record.items():
        if key in ("kind", "time", "step"):
            continue
        many = isinstance(value, list)
        for index, item in enumerate(value if many else [value]):
            if isinstance(item, int | float) and not isinstance(item, bool):
                yield f"{prefix}{key}_worker{index}" if many else f"{prefix}{key}", item
