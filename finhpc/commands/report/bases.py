"""The scores of a model that no run here need have made: the base of a finetuning."""

from __future__ import annotations

import os
from collections.abc import Sequence

from finhpc.commands.report.runs import Collected, Tracked


def base_scores(found: Collected, path: str, tasks: Sequence[str]) -> dict[str, float | None]:
    """Task -> percent, of the newest evaluation of the model in `path` that scored it.

    By the run that made the model, whose scores `finhpc evaluate` puts there, else by evaluations' own runs, where
    it was scored without an adapter and as it is.
    """
    scores: dict[str, float | None] = dict.fromkeys(tasks)
    for run in (*found.evaluations, found.makers.get(path.rstrip("/"))):
        if run and (run.verb != "evaluate" or _scored_bare(run, path)):
            scores |= {task: score for task in tasks if (score := run.score(task)) is not None}
    return scores


def measured_runs(found: Collected, path: str) -> list[Tracked]:
    """The runs that may bear the bare model's size and speed: the one that made it, or evaluations of it."""
    maker = found.makers.get(path.rstrip("/"))
    return [maker] if maker else [evaluation for evaluation in found.evaluations if _scored_bare(evaluation, path)]


def _scored_bare(evaluation: Tracked, path: str) -> bool:
    """Whether an evaluation scored the model in `path` without an adapter and at the bits it is stored at."""
    if evaluation.whole("quantization.bits") not in (None, 16):
        return False
    models, adapters = evaluation.listed("model"), evaluation.listed("adapter")
    return len(models) == 1 and _same(models[0], path) and all(adapter in ("none", "") for adapter in adapters)


def _same(given: str, path: str) -> bool:
    """Whether what an evaluation was given, perhaps relative to a folder unknown here, is the whole path."""
    given = os.path.normpath(os.path.expanduser(given))
    return given == path.rstrip("/") or (not os.path.isabs(given) and path.rstrip("/").endswith(f"/{given}"))
