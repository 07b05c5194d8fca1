"""`finhpc evaluate`: models x tasks, scored in parallel on the Ray cluster.

A run folder holds `tasks/` (lm-eval task files and their examples), `scores/MODEL/TASK.json` with `TASK.parquet` (the
prediction of each example), and `result.json`. A pair of a model and a task is computed again only if the model, the
task or the settings changed.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from finhpc.cluster.connect import cluster_resources, places, ray_cluster, room_in, use_cuda
from finhpc.cluster.package import Driver
from finhpc.cluster.tasks import WorkerDiedError, completed
from finhpc.commands.evaluate.report import log_to_mlflow, summary
from finhpc.commands.evaluate.worker import Pair, Scorer
from finhpc.data.shards.shards import Shards
from finhpc.errors import ConfigError, FinhpcError, TrainingFailedError, collect
from finhpc.evaluation.models import Subject, subjects
from finhpc.evaluation.tasks import PERPLEXITY, TaskFile, prepare_tasks
from finhpc.files import json_sha256, redact, write_atomic
from finhpc.quantization.schemes import check_scheme
from finhpc.runs.folder import RunFolder
from finhpc.screen import Progress, counted
from finhpc.settings.base import to_yaml
from finhpc.settings.evaluate import EvaluateConfig
from finhpc.tracking.store import check_store

log = logging.getLogger(__name__)

FORMAT = 1
Failure = tuple[Pair, FinhpcError]


def evaluate(config: EvaluateConfig, dry_run: bool = False) -> dict[str, Any]:
    """Score every model on every task and return the content of the run folder's result.json.

    `scores` maps task to metric to value, next to `ci95`, `majority` and `random`; `models` has the scores of each
    model, and the top-level `scores` are null if there are several. Continues an interrupted run. `dry_run` checks and
    counts only. Raises one `ConfigError` with every problem of settings, models and data, and the first error of a
    pair that could not be scored once all others are.
    """
    began = time.monotonic()
    folder = RunFolder(config.run.storage, config.run.name)
    uri = config.run.mlflow_uri
    check_store(uri, config.run.experiment)
    if dry_run:
        models, _, pairs, pending, result = _planned(config, folder.path, write=False)
        what = f"{counted(len(models), 'model')} x {counted(len(result['tasks']), 'task')}"
        log.info(f"{what}, {len(pending)} of {counted(len(pairs), 'pair')} to score")
        return result
    with folder.lock():
        models, tasks, pairs, pending, result = _planned(config, folder.path, write=True)
        run = config.run.model_copy(update={"tracking_uri": redact(config.run.tracking_uri or "") or None})
        write_atomic(folder.path / "config.yaml", to_yaml(config.model_copy(update={"run": run})).encode())
        folder.write_environment()
        scoring_began = time.monotonic()
        failed: list[Failure] = []
        if pending:
            with ray_cluster():
                failed = _score_all(config, pending)
        result |= _collected(models, pairs) | {
            "status": "failed" if failed else "finished",
            "failed": [{"model": p.subject.name, "task": p.name, "error": str(error)} for p, error in failed],
            "scoring_s": time.monotonic() - scoring_began,
            "wall_s": time.monotonic() - began,
        }
        folder.write_result(result)
        result["mlflow_run_id"], result["tracking_uri"] = log_to_mlflow(config, folder.path, models, tasks, result)
        folder.write_result(result)
    summary(result)
    if failed:
        raise _failure(failed, len(pairs), folder.path)
    return result


def _planned(
    config: EvaluateConfig, folder: Path, write: bool
) -> tuple[list[Subject], list[TaskFile], list[Pair], list[Pair], dict[str, Any]]:
    """Return models, tasks, all pairs, those to score, and the result so far; with `write`, write the task files.

    Raises one `ConfigError` with every problem of settings, models and data.
    """
    problems = [] if config.tasks else ["tasks is empty; name at least one."]
    models: list[Subject] = []
    tasks: list[TaskFile] = []
    with collect(problems):
        models = subjects(config.model, config.adapter)
    with collect(problems):
        tasks = prepare_tasks(config, folder / "tasks", write)
    if PERPLEXITY in config.tasks and config.data.shards is None:
        problems.append(
            "tasks=perplexity needs prepared text; give --data.shards with a folder written by `finhpc prepare`."
        )
    elif PERPLEXITY in config.tasks:
        try:
            shards = Shards.open(str(config.data.shards))
            shards.check_seq_len(config.data.seq_len or shards.manifest.block_len)
        except ConfigError as error:  # damaged shards are another kind of error
            problems += error.problems
    with collect(problems):
        check_scheme(config.quantization.bits, config.quantization.scheme)
    if problems:
        raise ConfigError(problems)
    for note in (note for task in tasks for note in task.notes):
        log.info(note)
    pairs = [_pair(config, folder, subject, task) for subject in models for task in (*tasks, None)]
    pairs = [pair for pair in pairs if pair.task is not None or PERPLEXITY in config.tasks]
    pending = [pair for pair in pairs if pair.read() is None]
    result: dict[str, Any] = {
        "status": "dry_run",
        "tasks": [task.name for task in tasks] + ([PERPLEXITY] if PERPLEXITY in config.tasks else []),
        "examples": {task.name: task.examples for task in tasks},
        "pairs": len(pairs),
        "pairs_pending": len(pending),
        "scores": None,
        "models": [{"name": s.name, "model": s.path, "adapter": s.adapter, "scores": None} for s in models],
    }
    return models, tasks, pairs, pending, result


def _pair(config: EvaluateConfig, folder: Path, subject: Subject, task: TaskFile | None) -> Pair:
    """Return the pair of a model and a task (None: perplexity) with the hash of all that its scores depend on."""
    settings = config.model_dump(include={"limit", "seed", "bootstrap", "dtype", "quantization"})
    of_data: Any = task.sha256 if task is not None else None
    if task is None and config.data.shards is not None:
        data = config.data
        of_data = [Shards.open(data.shards or "").manifest.fingerprint, data.split, data.seq_len]
    out = folder / "scores" / subject.name / (task.name if task else PERPLEXITY)
    return Pair(subject, task, out, json_sha256([FORMAT, subject.stamp(), of_data, settings]))


def _score_all(config: EvaluateConfig, pending: list[Pair]) -> list[Failure]:
    """Score the pairs on as many workers as fit the cluster; return the pairs that failed, each with its error."""
    import ray

    resources, cuda = config.resources, use_cuda(config.resources, cluster_resources())
    places(resources, cuda, config.workers)  # raises if the workers can never start
    free = room_in(ray.available_resources(), resources, cuda)
    if not free:
        log.info("all CPUs or GPUs of the cluster are in use; scoring begins when a worker can start.")
    actor = ray.remote(num_cpus=resources.cpus_per_worker, num_gpus=resources.gpus_per_worker if cuda else 0)(Scorer)
    number = min(config.workers or max(free, 1), len(pending))
    # Each actor with the name of the model that it has open.
    workers: dict[Any, str | None] = {actor.remote(config, cuda, Driver.here()): None for _ in range(number)}
    idle, waiting, failed = list(workers), list(pending), []

    def start(running: int) -> tuple[Any, tuple[Any, Pair]] | None:
        if not idle or not waiting:
            return None
        worker = idle.pop(0)
        others = {model for other, model in workers.items() if other != worker}

        def rank(pair: Pair) -> tuple[bool, bool, int]:  # its open model, then a model no other has open; longest first
            return pair.subject.name != workers[worker], pair.subject.name in others, -pair.weight

        pair = min(waiting, key=rank)
        waiting.remove(pair)
        workers[worker] = pair.subject.name
        return worker.score.remote(pair), (worker, pair)

    try:
        with Progress("scoring", len(pending), "tasks") as progress:
            for (worker, pair), error in completed(start, lambda item: item[1].title):
                if isinstance(error, WorkerDiedError):
                    raise TrainingFailedError(
                        f"{error} Perhaps memory ran out: use fewer --workers or a smaller --batch_size."
                    )
                if error is not None:
                    failed.append((pair, error))
                idle.append(worker)
                progress.advance(1)
    finally:
        for worker in workers:
            ray.kill(worker)
    return failed


def _failure(failed: list[Failure], pairs: int, folder: Path) -> FinhpcError:
    """Return one error about all pairs that failed, of the kind of the first."""
    lines = [f"{pair.title}: {line}" for pair, error in failed for line in str(error).splitlines()]
    if len(failed) < pairs:
        rest = counted(pairs - len(failed), "other pair")
        lines.append(f"{rest} of {pairs} scored in {folder}; fix this and rerun the command to score what is missing.")
    first = failed[0][1]
    return ConfigError(lines) if isinstance(first, ConfigError) else type(first)("\n".join(lines))


def _collected(models: list[Subject], pairs: list[Pair]) -> dict[str, Any]:
    rows = []
    for subject in models:
        scores = {pair.name: pair.read() for pair in pairs if pair.subject == subject}
        scores = {task: of_task for task, of_task in scores.items() if of_task is not None}
        rows.append({"name": subject.name, "model": subject.path, "adapter": subject.adapter, "scores": scores})
    return {"models": rows, "scores": rows[0]["scores"] if len(rows) == 1 else None}
