"""The scores of a model that no run here need have made: the base of a finetuning."""

from __future__ import annotations

import os
from collections.abc import Sequence

from finhpc.reporting.runs import Collected, Tracked

ALONE = "evaluate"  # what the only model's scores are logged under


def base_scores(found: Collected, path: str, tasks: Sequence[str]) -> dict[str, float | None]:
    """Task -> percent, of the newest evaluation of the model in `path` that scored it.

    By the run that made the model, whose scores `finhpc evaluate` puts there, else by evaluations' own runs, where
    it was scored without an adapter and as it is.
    """
    scores: dict[str, float | None] = dict.fromkeys(tasks)
    for evaluation in found.evaluations:
        if prefix := _prefix(evaluation, path):
            scores |= {task: score for task in tasks if (score := evaluation.score(task, prefix)) is not None}
    if maker := found.makers.get(path.rstrip("/")):
        scores |= {task: score for task in tasks if (score := maker.score(task)) is not None}
    return scores


def measured_runs(found: Collected, path: str) -> list[Tracked]:
    """The runs that may bear the bare model's size and speed: the one that made it, or evaluations of it alone."""
    maker = found.makers.get(path.rstrip("/"))
    alone = [evaluation for evaluation in found.evaluations if _prefix(evaluation, path) == ALONE]
    return [maker] if maker else alone


def _prefix(evaluation: Tracked, path: str) -> str | None:
    """Below which name an evaluation logged the bare model in `path`; None where it did not score it so."""
    if evaluation.whole("quantization.bits") not in (None, 16):
        return None
    models, adapters = evaluation.listed("model"), evaluation.listed("adapter")
    if len(models) == 1 and adapters:  # one model under several adapters
        models = models * len(adapters)
    pairs = list(zip(models, adapters or ["none"] * len(models), strict=False))
    if not any(adapter in ("none", "") and _same(model, path) for model, adapter in pairs):
        return None
    if len(pairs) == 1:
        return ALONE
    parts = [part for part in path.split("/") if part]
    generic = len(parts) > 1 and parts[-1] in ("model", "adapter")
    return f"evaluate/{parts[-2] if generic else parts[-1]}"


def _same(given: str, path: str) -> bool:
    """Whether what an evaluation was given, perhaps relative to a folder unknown here, is the whole path."""
    given = os.path.normpath(os.path.expanduser(given))
    return given == path.rstrip("/") or (not os.path.isabs(given) and path.rstrip("/").endswith(f"/{given}"))
