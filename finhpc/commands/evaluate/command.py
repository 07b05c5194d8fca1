"""`finhpc evaluate`: models x tasks, scored side by side on the Ray cluster.

A run folder holds `tasks/` (lm-eval task files and their examples), `scores/MODEL/TASK.json` with
`TASK.parquet`, the prediction for each example, and `result.json`. A pair of a model and a task that has its
file is not computed again as long as neither the model, the task nor the settings changed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finhpc.cluster.connect import cluster_resources, ray_cluster
from finhpc.cluster.package import Driver
from finhpc.commands.evaluate.report import log_to_mlflow, summary
from finhpc.commands.evaluate.worker import Pair, Scorer
from finhpc.data.shards.shards import Shards
from finhpc.errors import ConfigError, FinhpcError, TrainingFailedError
from finhpc.evaluation.models import Subject, subjects
from finhpc.evaluation.tasks import PERPLEXITY, TaskFile, prepare_tasks
from finhpc.files import redact, write_atomic
from finhpc.quantization.schemes import SCHEMES
from finhpc.runs.folder import RunFolder
from finhpc.runs.run import whole_path
from finhpc.screen import Progress
from finhpc.settings.base import to_yaml
from finhpc.settings.evaluate import EvaluateConfig
from finhpc.tracking.store import check_store
from finhpc.tracking.tracker import absolute_tracking_uri, default_tracking_uri

log = logging.getLogger(__name__)

FORMAT = 1
Failure = tuple[Pair, FinhpcError]


def evaluate(config: EvaluateConfig, dry_run: bool = False) -> dict[str, Any]:
    """Score every model on every task; returns what the run folder's result.json holds.

    `scores` is task: metric: value, with `ci95`, `majority` and `random` beside, of the only model, or null where
    there are several; `models` has them of each. Continues an interrupted run. With `dry_run` it checks models and
    data, counts, and writes nothing. Raises `ConfigError` listing every problem with settings, models and data.
    """
    began = time.monotonic()
    if config.data.shards:  # workers have other working directories
        data = config.data.model_copy(update={"shards": whole_path(config.data.shards)})
        config = config.model_copy(update={"data": data})
    folder = RunFolder(config.run.storage, config.run.name)
    uri = absolute_tracking_uri(config.run.tracking_uri or default_tracking_uri(config.run.storage))
    check_store(uri, config.run.experiment)
    if dry_run:
        found, _, pairs, pending, result = _planned(config, folder.path, write=False)
        what = f"{_counted(len(found), 'model')} x {_counted(len(result['tasks']), 'task')}"
        log.info(f"{what}, {len(pending)} of {_counted(len(pairs), 'pair')} to score")
        return result
    with folder.lock():
        found, tasks, pairs, pending, result = _planned(config, folder.path, write=True)
        run = config.run.model_copy(update={"tracking_uri": redact(config.run.tracking_uri or "") or None})
        write_atomic(folder.path / "config.yaml", to_yaml(config.model_copy(update={"run": run})).encode())
        folder.write_environment()
        scoring_began = time.monotonic()
        failed: list[Failure] = []
        if pending:
            with ray_cluster():
                failed = _score_all(config, pending)
        result |= _collected(found, pairs) | {
            "status": "failed" if failed else "finished",
            "failed": [{"model": p.subject.name, "task": p.name, "error": str(error)} for p, error in failed],
            "scoring_s": time.monotonic() - scoring_began,
            "wall_s": time.monotonic() - began,
        }
        folder.write_result(result)
        result["mlflow_run_id"], result["tracking_uri"] = log_to_mlflow(config, folder.path, found, tasks, result)
        folder.write_result(result)
    summary(result)
    if failed:
        raise _failure(failed, len(pairs), folder.path)
    return result


def _planned(
    config: EvaluateConfig, folder: Path, write: bool
) -> tuple[list[Subject], list[TaskFile], list[Pair], list[Pair], dict[str, Any]]:
    """The models, the tasks, all pairs, those to be scored, and the result so far; `write`: the task files too."""
    found, tasks = _checked(config, folder, write)
    for note in (note for task in tasks for note in task.notes):
        log.info(note)
    pairs = [_pair(config, folder, subject, task) for subject in found for task in (*tasks, None)]
    pairs = [pair for pair in pairs if pair.task is not None or PERPLEXITY in config.tasks]
    pending = [pair for pair in pairs if not pair.done()]
    result: dict[str, Any] = {
        "status": "dry_run",
        "tasks": [task.name for task in tasks] + ([PERPLEXITY] if PERPLEXITY in config.tasks else []),
        "examples": {task.name: task.examples for task in tasks},
        "pairs": len(pairs),
        "pairs_pending": len(pending),
        "scores": None,
        "models": [{"name": s.name, "model": s.path, "adapter": s.adapter, "scores": None} for s in found],
    }
    return found, tasks, pairs, pending, result


def _checked(config: EvaluateConfig, folder: Path, write: bool) -> tuple[list[Subject], list[TaskFile]]:
    """Models and task files, or one error with everything that is wrong."""
    problems: list[str] = []
    found: list[Subject] = []
    tasks: list[TaskFile] = []
    if not config.tasks:
        problems.append("tasks is empty; name at least one.")
    try:
        found = subjects(config.model, config.adapter)
    except ConfigError as error:
        problems += error.problems
    try:
        tasks = prepare_tasks(config, folder / "tasks", write)
    except ConfigError as error:
        problems += error.problems
    problems += _shards_problems(config) + _quantization_problems(config)
    if problems:
        raise ConfigError(problems)
    return found, tasks


def _shards_problems(config: EvaluateConfig) -> list[str]:
    if PERPLEXITY not in config.tasks:
        return []
    if config.data.shards is None:
        return ["tasks=perplexity needs prepared text; give --data.shards with a folder written by `finhpc prepare`."]
    try:
        shards = Shards.open(config.data.shards)
        shards.check_seq_len(config.data.seq_len or shards.manifest.block_len)
    except ConfigError as error:
        return error.problems
    return []


def _quantization_problems(config: EvaluateConfig) -> list[str]:
    bits, scheme = config.quantization.bits, config.quantization.scheme
    if bits < 16 and bits not in SCHEMES[scheme].bits:
        fits = ", ".join(name for name, known in SCHEMES.items() if bits in known.bits)
        return [f"quantization.scheme={scheme} does not fit quantization.bits={bits}; use a scheme of {bits}: {fits}."]
    return []


def _pair(config: EvaluateConfig, folder: Path, subject: Subject, task: TaskFile | None) -> Pair:
    """A model and a task (None: perplexity), and the hash of all that its scores depend on."""
    kept = config.model_dump(include={"limit", "seed", "bootstrap", "dtype", "quantization"})
    of_data: Any = task.sha256 if task is not None else None
    if task is None and config.data.shards is not None:
        data = config.data
        of_data = [Shards.open(data.shards or "").manifest.fingerprint, data.split, data.seq_len]
    sha256 = hashlib.sha256(json.dumps([FORMAT, subject.stamp(), of_data, kept], sort_keys=True).encode()).hexdigest()
    return Pair(subject, task, folder / "scores" / subject.name / (task.name if task else PERPLEXITY), sha256)


@dataclass
class _Place:
    """A worker and what it holds."""

    actor: Any
    model: str | None = None


def _score_all(config: EvaluateConfig, pending: list[Pair]) -> list[Failure]:
    """Score the pairs on as many workers as there is room for; each goes on with the model it has open.

    Returns those that could not be scored, each with what was wrong with it; the others are.
    """
    import ray
    from ray.exceptions import RayError

    waiting, failed = list(pending), []
    places = [_Place(actor) for actor in _actors(config, len(waiting))]
    running: dict[Any, tuple[_Place, Pair]] = {}
    idle = list(places)
    with Progress("scoring", len(waiting), bytes_=False) as progress:
        try:
            while waiting or running:
                while waiting and idle:
                    place = idle.pop(0)
                    pair = _next(waiting, place, places)
                    place.model = pair.subject.name
                    running[place.actor.score.remote(pair)] = (place, pair)
                for done in ray.wait(list(running), num_returns=1)[0]:
                    place, pair = running.pop(done)
                    if (error := ray.get(done)) is not None:
                        failed.append((pair, error))
                    idle.append(place)
                    progress.advance(1)
        except RayError as error:  # the worker's process died
            reason = str(error).strip().splitlines()[0].rstrip(".")
            raise TrainingFailedError(
                f"a worker that scored died ({reason}), perhaps of too little memory; use fewer --workers or a smaller "
                "--batch_size. Finished pairs are kept: the same command goes on."
            ) from None
        finally:
            for place in places:
                ray.kill(place.actor)
    return failed


def _failure(failed: list[Failure], pairs: int, folder: Path) -> FinhpcError:
    """One error of all pairs that could not be scored, of the kind of the first."""
    lines = [f"{pair.subject.name} on {pair.name}: {line}" for pair, e in failed for line in str(e).splitlines()]
    if len(failed) < pairs:
        rest = pairs - len(failed)
        lines.append(f"{_counted(rest, 'other pair')} of {pairs} stand in {folder}; the same command scores the rest.")
    first = failed[0][1]
    return ConfigError(lines) if isinstance(first, ConfigError) else type(first)("\n".join(lines))


def _next(waiting: list[Pair], place: _Place, places: list[_Place]) -> Pair:
    """The pair a free worker takes: of its own model, else of one that no other holds, else any; the longest first."""
    others = {other.model for other in places if other is not place}
    chosen = min(
        waiting,
        key=lambda pair: (pair.subject.name != place.model, pair.subject.name in others, -pair.weight),
    )
    waiting.remove(chosen)
    return chosen


def _actors(config: EvaluateConfig, most: int) -> Iterator[Any]:
    """Workers: as many as asked for, or as the cluster has room for, and no more than there are pairs."""
    import ray

    resources, total = config.resources, cluster_resources()
    gpus = total.get("GPU", 0)
    if resources.device == "cuda" and not gpus:
        raise ConfigError(
            "resources.device=cuda, but the cluster has no GPU; use --resources.device cpu, or a cluster with GPUs."
        )
    cuda = resources.device != "cpu" and gpus > 0
    room = total.get("CPU", 1) / resources.cpus_per_worker
    room = int(min(room, gpus / resources.gpus_per_worker) if cuda else room)
    if room < max(config.workers, 1):
        raise ConfigError(
            f"workers={config.workers or 1} of resources.cpus_per_worker={resources.cpus_per_worker:g} do not fit the "
            f"cluster, which has room for {room}; use fewer workers, or fewer CPUs for each."
        )
    actor = ray.remote(num_cpus=resources.cpus_per_worker, num_gpus=resources.gpus_per_worker if cuda else 0)(Scorer)
    for _ in range(min(config.workers or room, most)):
        yield actor.remote(config, cuda, Driver.here())


def _collected(found: list[Subject], pairs: list[Pair]) -> dict[str, Any]:
    models = []
    for subject in found:
        scores = {pair.name: pair.read() for pair in pairs if pair.subject == subject and pair.done()}
        models.append({"name": subject.name, "model": subject.path, "adapter": subject.adapter, "scores": scores})
    return {"models": models, "scores": models[0]["scores"] if len(models) == 1 else None}


def _counted(number: int, what: str) -> str:
    """1 model, 2 models."""
    return f"{number} {what}{'' if number == 1 else 's'}"
