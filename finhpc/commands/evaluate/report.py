"""How `finhpc evaluate` reports scores: tables on the screen, and runs in MLflow.

The scores of a model are logged to the MLflow run that made it, if its run folder names one, and with the table and
the predictions to a run of the evaluation. Of several models each has a nested run, named EVALUATION/MODEL, with the
same metric names, so that MLflow's comparison page shows them together.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finhpc.data.shards.shards import Shards
from finhpc.evaluation.models import Subject
from finhpc.evaluation.tasks import PERPLEXITY, TaskFile
from finhpc.files import redact
from finhpc.screen import rows_table
from finhpc.settings.evaluate import EvaluateConfig
from finhpc.tracking.describe import Dataset, parameters
from finhpc.tracking.mirror import State, tracked_run
from finhpc.tracking.store import active_run, experiment_id, reason, set_up_client
from finhpc.tracking.tags import COMMAND, PARENT, setting_tags
from finhpc.tracking.writer import RunWriter

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

METRICS = ("weighted_f1", "acc", "acc_norm", "perplexity")  # those shown, the first a task has leads


def log_to_mlflow(
    config: EvaluateConfig, folder: Path, subjects: list[Subject], tasks: list[TaskFile], result: dict[str, Any]
) -> tuple[str | None, str]:
    """Log everything to MLflow; return the evaluation's run id, or None if MLflow refused it, and MLflow's address.

    Refused scores remain in the run folder; the same command sends them again.
    """
    set_up_client()
    from mlflow import MlflowClient

    uri = config.run.mlflow_uri
    run_id: str | None = None
    with _refusal_reported(uri, folder):
        datasets = _datasets(config, tasks)
        run_id = _own_run(MlflowClient(tracking_uri=uri), config, folder, uri, result, datasets)
    for subject, model in zip(subjects, result["models"], strict=True):
        folder_of_run = subject.made_by
        if folder_of_run is not None and (tracked := tracked_run(folder_of_run, uri)):
            with _refusal_reported(tracked[0], folder_of_run):
                _log_scores(RunWriter(MlflowClient(tracking_uri=tracked[0]), tracked[1]), model["scores"])
    return run_id, redact(uri)


@contextmanager
def _refusal_reported(uri: str, folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # MLflow and the network raise many kinds; the scores are on disk
        log.info(
            f"MLflow at {redact(uri)} did not accept the scores ({reason(error)}); they are in {folder}: rerun the "
            "command to send them."
        )


def _datasets(config: EvaluateConfig, tasks: list[TaskFile]) -> list[Dataset]:
    """Return the data of the scores: the file of each task, and the shards of perplexity."""
    files = config.data.files
    datasets_ = [
        Dataset(task.name, task.sha256, files.get(task.name, config.data.folder or str(task.path)), "evaluation",
                {"examples": task.examples})
        for task in tasks
    ]  # fmt: skip
    if PERPLEXITY in config.tasks and config.data.shards:
        datasets_.append(Dataset.of_shards(Shards.open(config.data.shards), "evaluation"))
    return datasets_


def _own_run(
    client: MlflowClient,
    config: EvaluateConfig,
    folder: Path,
    uri: str,
    result: dict[str, Any],
    datasets: list[Dataset],
) -> str:
    """The evaluation's run: one for the folder, however often the command runs."""
    state = State.load(folder, redact(uri), config.run.experiment, config.run.name)
    if active_run(client, state.run_id) is None:
        experiment = experiment_id(client, uri, config.run.experiment)
        state.run_id = str(client.create_run(experiment, run_name=config.run.name).info.run_id)
        state.save()
        one = result["models"][0] if len(result["models"]) == 1 else None
        _describe(RunWriter(client, state.run_id), config, one, datasets, {})
    run_id = str(state.run_id)
    if len(result["models"]) == 1:
        _log_scores(RunWriter(client, run_id), result["models"][0]["scores"])
    else:
        _compare(client, run_id, config, result, datasets)
    rows = score_rows(result)
    columns = list(rows[0]) if rows else []
    client.log_dict(run_id, {"columns": columns, "data": [list(row.values()) for row in rows]}, "scores.json")
    client.log_artifacts(run_id, str(folder / "scores"), "predictions")
    client.log_artifacts(run_id, str(folder / "tasks"), "tasks")
    client.set_terminated(run_id, "FAILED" if result["failed"] else "FINISHED")
    return run_id


def _compare(
    client: MlflowClient, parent: str, config: EvaluateConfig, result: dict[str, Any], datasets: list[Dataset]
) -> None:
    """Log a nested run per model, the same one on every rerun.

    The evaluation's own run has the best model's main score of each task, as a sweep's has its best trial's.
    """
    experiment = client.get_run(parent).info.experiment_id
    known = client.search_runs([experiment], f"tags.`{PARENT}` = '{parent}'")
    ids = {run.info.run_name: run.info.run_id for run in known}
    failed = {failure["model"] for failure in result["failed"]}
    for model in result["models"]:
        name = f"{config.run.name}/{model['name']}"
        if name not in ids:
            ids[name] = client.create_run(experiment, run_name=name, tags={PARENT: parent}).info.run_id
            one = {"model": [model["model"]], "adapter": [model["adapter"]] if model["adapter"] else []}
            _describe(RunWriter(client, ids[name]), config.model_copy(update=one), model, datasets, {PARENT: parent})
        _log_scores(RunWriter(client, ids[name]), model["scores"])
        client.set_terminated(ids[name], "FAILED" if model["name"] in failed else "FINISHED")
    for task in dict.fromkeys(task for model in result["models"] for task in model["scores"]):
        scores = [model["scores"][task] for model in result["models"] if task in model["scores"]]
        if (main := _main(scores[0])) is not None:
            best = (min if main == PERPLEXITY else max)(score[main] for score in scores)
            client.log_metric(parent, f"evaluate/{task}/{main}", best)


def _describe(
    run: RunWriter, config: EvaluateConfig, model: dict[str, Any] | None, datasets: list[Dataset], tags: dict[str, str]
) -> None:
    """Log parameters, settings and datasets of a run; `model`: the only one that it scores."""
    params = parameters(config, {}, {"model": model["name"]} if model else {})
    params.pop("tasks", None)
    tags = setting_tags(config) | {COMMAND: "evaluate", "mlflow.source.name": "finhpc evaluate", **tags}
    run.describe(params, tags, datasets)


def _log_scores(run: RunWriter, scores: dict[str, Any]) -> None:
    """Log `evaluate/TASK/METRIC`, its interval and the majority's score; each task's main metric comes first."""
    main: list[tuple[str, float]] = []
    others: list[tuple[str, float]] = []
    for task, values in scores.items():
        figures = {name: value for name, value in values.items() if isinstance(value, int | float)}
        for name, (low, high) in (values["ci95"] or {}).items():
            figures |= {f"{name}_ci95_low": low, f"{name}_ci95_high": high}
        figures |= {f"{name}_majority": value for name, value in (values["majority"] or {}).items()}
        for name, value in figures.items():
            (main if name == _main(figures) else others).append((f"evaluate/{task}/{name}", value))
    run.log_figures(main + others)


def _main(scores: dict[str, Any]) -> str | None:
    return next((name for name in METRICS if name in scores), None)


def score_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row per model, task and metric."""
    rows: list[dict[str, Any]] = []
    for model in result["models"]:
        for task, values in model["scores"].items():
            for metric in (name for name in METRICS if name in values):
                row = {"model": model["name"], "task": task, "metric": metric, "value": values[metric]}
                row["ci95_low"], row["ci95_high"] = (values["ci95"] or {}).get(metric, (None, None))
                row |= {name: (values[name] or {}).get(metric) for name in ("majority", "random")}
                rows.append(row | {name: values[name] for name in ("examples", "unread", "cut")})
    return rows


def summary(result: dict[str, Any]) -> None:
    """Print a table per task, and what to know about the scores."""
    rows = score_rows(result)
    for task in result["tasks"]:
        shown = []
        for row in (row for row in rows if row["task"] == task):
            interval = "" if row["ci95_low"] is None else f"{_short(row['ci95_low'])} to {_short(row['ci95_high'])}"
            line = {"model": row["model"], "metric": row["metric"], "score": _short(row["value"]), "95 %": interval}
            line |= {name: _short(row[name]) for name in ("majority", "random")}
            shown.append(line | {name: row[name] or "" for name in ("examples", "unread", "cut")})
        rows_table(f"scores on {task}", shown)
    for model in result["models"]:
        for task, values in model["scores"].items():
            if values.get("tied"):
                examples = f"{values['tied']} of {values['examples']} examples"
                log.info(f"{model['name']} on {task}: {examples} have several best answers; the first one counts")
    if any(row["cut"] for row in rows):
        log.info("cut: prompts longer than the context, truncated on the left as lm-eval does")


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"
