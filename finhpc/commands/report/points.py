"""The points of the scatter plots: what a model costs, and how good it is."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from finhpc.commands.report.runs import FINANCIAL, Collected, Scale, Tracked
from finhpc.commands.report.tables import Row
from finhpc.tracking.tags import SCORED_FROM

BYTES_16BIT = 2


@dataclass(frozen=True)
class Point:
    """`x`: bytes or worker-hours; `measured`: whether all of x was, see `_cost`."""

    x: float
    y: float
    kind: str
    bits: int
    label: str
    measured: bool = True


def pretrained_points(found: Collected, scale: Scale, rows: list[Row], what: str) -> list[Point]:
    """Validation loss of each row, and for sizes of the same models scored at fewer bits."""
    points = []
    for row in rows:
        loss, name = row.values["val_loss"], f"r{row.rank}" if row.rank else row.kind
        x, measured = _cost(row, what)
        if loss and x is not None:
            points.append(Point(x, loss.mean, row.kind, row.bits or 16, name, measured))
    if what == "size":
        points += _scored_points(found, rows)
    return points


def _cost(row: Row, what: str) -> tuple[float | None, bool]:
    """Bytes or worker-hours, and whether they were measured as a whole: not sizes counted from the parameters, nor
    hours without those of a start that MLflow does not know.
    """
    if what == "time":
        # A model that starts from another's weights cost that one's training too.
        hours, whole = row.values["worker_hours"], row.values.get("worker_hours_with_start")
        known = whole is not None or not any(run.setting("model.path") for run in row.runs)
        found = whole or hours
        return (found.mean if found else None), known
    bits = row.bits or 16
    sizes = [size for run in row.runs if (size := run.metrics.get(f"size_{bits}bit_bytes")) is not None]
    if sizes:
        return statistics.fmean(sizes), True
    params = row.values["params_total"]
    return (BYTES_16BIT * params.mean if params and bits == 16 else None), False


def _scored_points(found: Collected, rows: list[Row]) -> list[Point]:
    """One for each row and number of bits that its trained models were scored at, means over the seeds."""
    points = []
    for row in rows:
        ids = {run.id for run in row.runs}
        of_row = [run for run in found.scored if run.tags[SCORED_FROM] in ids]
        for bits in (8, 4):
            runs = [run for run in of_row if run.whole("quantization.bits") == bits]
            losses, sizes = _known(runs, lambda run: run.metrics.get("val_loss")), _known(runs, _size)
            if losses and sizes:
                name = f"r{row.rank}" if row.rank else row.kind
                points.append(Point(statistics.fmean(sizes), statistics.fmean(losses), row.kind, bits, name))
    return points


def _size(run: Tracked) -> float | None:
    """Bytes of the model at the run's bits."""
    return run.metrics.get(f"size_{run.whole('quantization.bits')}bit_bytes", run.metrics.get("size_bytes"))


def _known(runs: list[Tracked], figure: Callable[[Tracked], float | None]) -> list[float]:
    return [value for run in runs if (value := figure(run)) is not None]


def tuned_points(scores: list[Row], costs: list[Row], what: str) -> tuple[list[Point], str]:
    """Points of the adapters, and what their quality is: F1 of held-out labels, or the mean of the financial tasks."""
    key = "size_gb" if what == "size" else "worker_hours"
    held_out = any(row.values["held_out_f1"] for row in scores)
    points = []
    for row, cost in zip(scores, costs, strict=True):
        if row.kind == "base" and (what == "time" or held_out):
            continue  # was not finetuned
        tasks = [value.mean for task in FINANCIAL if (value := row.values[task])]
        quality = row.values["held_out_f1"].mean if row.values["held_out_f1"] else None
        y = quality if held_out else statistics.fmean(tasks) if tasks else None
        x = cost.values[key]
        if x and y is not None:
            name = f"r{row.rank}" if row.rank else "base"
            points.append(Point(x.mean * (1e9 if what == "size" else 1), y, row.kind, row.bits or 16, name))
    return points, "weighted F1 of held-out labels" if held_out else "mean of FPB, FiQA SA and TFNS"
