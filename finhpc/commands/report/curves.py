"""Loss curves of the runs of a row, and their means."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from finhpc.commands.report.runs import Collected, Curve, Tracked

POINTS = 400  # drawn of a training loss, each the mean of the steps around it


def mean_curve(found: Collected, runs: Sequence[Tracked], metric: str) -> Curve:
    """The mean over the runs at every step that all of them have; empty where one has none."""
    curves = [found.curve(run, metric) for run in runs]
    shared = set.intersection(*(set(curve) for curve in curves)) if curves else set()
    return {step: statistics.fmean(curve[step] for curve in curves) for step in sorted(shared)}


def steps_to(curve: Curve, target: float) -> float | None:
    """The step at which a curve comes down to `target`, straight lines between its points; None: never."""
    before: tuple[int, float] | None = None
    for step, loss in curve.items():
        if loss <= target:
            if before is None:
                return float(step)
            return before[0] + (step - before[0]) * (before[1] - target) / (before[1] - loss)
        before = step, loss
    return None


def smoothed(curve: Curve, points: int = POINTS) -> Curve:
    """Means over windows of equal length, at most `points` of them, each at its last step; short curves stay whole."""
    steps = list(curve)
    width = max(1, len(steps) // 40, -(-len(steps) // points))
    windows = [steps[i : i + width] for i in range(0, len(steps), width)]
    return {window[-1]: statistics.fmean(curve[step] for step in window) for window in windows if window}
