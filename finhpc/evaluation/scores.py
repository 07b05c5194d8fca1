"""A model's scores on one task, with their baselines, intervals and predictions."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from finhpc.errors import DataError, ImplausibleError
from finhpc.evaluation.language_model import LanguageModel
from finhpc.evaluation.metrics import intervals, majority, random_guess, weighted_f1
from finhpc.evaluation.task_file import rendering
from finhpc.evaluation.tasks import TaskFile, load_task

Row = dict[str, Any]
FEWSHOT_SEED = 1234  # lm-eval's own default


def score(
    model: LanguageModel, task: TaskFile, resamples: int, seed: int, limit: int | None = None
) -> tuple[dict[str, Any], list[Row]]:
    """Return the scores of a model on a task, and its prediction for each example.

    `acc` and `acc_norm` are lm-eval's own; `weighted_f1` is over the classes of the answers (their places in the list
    of choices). `unread`: examples whose answers' scores are not finite or all the same, so that nothing was chosen;
    they count as lm-eval counts them. `tied`: examples in which several answers have the highest score; the first one
    counts, as in lm-eval. `cut`: examples whose prompt was truncated on the left. Raises `DataError` for a label that
    is not one of the choices, and for a template that cannot be rendered.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    opened = load_task(task)
    if opened.get_config("num_fewshot") is None:
        opened.set_config(key="num_fewshot", value=0)
    opened.set_fewshot_seed(seed=FEWSHOT_SEED)
    model.cut.clear()
    with rendering(task.trusted):
        result = _evaluated(model, opened, task, limit)
        rows = [
            _row(sample, opened, model.cut, task)
            for sample in sorted(result["samples"][task.name], key=lambda sample: int(sample["doc_id"]))
        ]
    if not any(row["read"] for row in rows) and any(row["n_choices"] > 1 for row in rows):
        raise ImplausibleError(
            f"tasks={task.name}: all answers of every example have the same likelihood, so that nothing was chosen; "
            "the model's weights are damaged, or the answers of the task file are all alike."
        )
    theirs = result["results"][task.name]
    scores = {name: float(theirs[f"{name},none"]) for name in ("acc", "acc_norm") if f"{name},none" in theirs}
    golds, predictions, choices = (np.array([row[key] for row in rows]) for key in ("gold", "prediction", "n_choices"))
    scores["weighted_f1"] = weighted_f1(list(zip(golds.tolist(), predictions.tolist(), strict=True)))
    means = {name: np.array([row[name] for row in rows], dtype=np.float64) for name in scores if name in rows[0]}
    return {
        **scores,
        "ci95": intervals(golds, predictions, means, resamples, seed) if resamples else None,
        "majority": majority(golds),
        "random": random_guess(golds, choices),
        "examples": len(rows),
        "examples_total": task.total,
        "unread": sum(not row["read"] for row in rows),
        "tied": sum(row["tied"] for row in rows),
        "cut": sum(row["cut"] for row in rows),
    }, rows


def _evaluated(model: LanguageModel, opened: Any, task: TaskFile, limit: int | None) -> dict[str, Any]:
    """Return lm-eval's own result, with its samples."""
    from jinja2 import TemplateError
    from lm_eval.evaluator import evaluate

    try:
        result: dict[str, Any] | None = evaluate(
            model,
            {task.name: opened},
            limit=limit if task.own else None,  # the examples of finhpc's tasks were drawn before
            bootstrap_iters=0,
            log_samples=True,
            confirm_run_unsafe_code=task.trusted,
        )
    except TemplateError as error:
        raise DataError(f"tasks={task.path}: a template cannot be rendered ({error}); correct the task file.") from None
    assert result is not None  # this process is the only one
    return result


def _row(sample: dict[str, Any], task: Any, cut: set[str], file: TaskFile) -> Row:
    """Return the row of one example in the table of predictions."""
    doc, target = sample["doc"], sample["target"]
    choices = task.doc_to_choice(doc)
    # As in WinoGrande: the choices are prompts, and the target is their end.
    several = isinstance(task.doc_to_text(doc), int)
    gold = task.doc_to_text(doc) if several else target
    gold = choices.index(gold) if isinstance(gold, str) and gold in choices else gold
    if not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise DataError(
            f"tasks={file.name}: the label {gold!r} of example {sample['doc_id']} is not one of {choices}; correct the "
            "task file or its data."
        )
    scores = np.array([float(answer[0]) for answer in sample["filtered_resps"]])
    prompts = [arguments[0] for arguments in sample["arguments"]]
    return {
        "example": int(sample["doc_id"]),
        "prompt": prompts[0] if not several else "",
        "choices": list(choices),
        "gold": gold,
        "prediction": int(np.argmax(scores)),
        "log_likelihoods": scores.tolist(),
        "acc": float(sample["acc"]) if "acc" in sample else None,
        **({"acc_norm": float(sample["acc_norm"])} if "acc_norm" in sample else {}),
        "read": bool(np.isfinite(scores).all() and len(np.unique(scores)) > 1),
        "tied": bool((scores == scores.max()).sum() > 1),
        "cut": any(prompt in cut for prompt in prompts),
        "n_choices": len(choices),
    }
