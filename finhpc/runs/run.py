"""One training from its settings to its model, resumable at any moment: what pretrain and finetune share."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeVar

from finhpc.cluster.connect import check_fits, cluster_resources, known_resources, ray_cluster, use_cuda
from finhpc.cluster.ready import check_ray
from finhpc.errors import ConfigError
from finhpc.interrupts import Terminated, terminable
from finhpc.runs import result as outcome
from finhpc.runs.folder import RunFolder
from finhpc.runs.job import Job
from finhpc.runs.launch import fit
from finhpc.runs.progress import Progress
from finhpc.runs.worker import FATAL, MEMORY, ROOM, ROOM_BYTES
from finhpc.screen import summary_table
from finhpc.settings.finetune import TrainingConfig
from finhpc.tracking.shown import HIDDEN, origin, setting_tags
from finhpc.tracking.store import check_store
from finhpc.tracking.tracker import Status, Tracker
from finhpc.training.checkpoint import list_complete
from finhpc.training.journal import DRIVER_FILE, WORKER_FILE

log = logging.getLogger(__name__)


class Pruned(BaseException):
    """A sweep's scheduler ended the run: others of its trials are ahead."""


Fit = Callable[[Job, RunFolder, bool], None]
J = TypeVar("J", bound=Job)


def checked(job: J) -> J:
    """The job, if MLflow will take its run; raises `ConfigError` otherwise, before anything starts."""
    config = job.config
    check_store(config.run.mlflow_uri, config.run.experiment)
    return job


def run(job: Job, dry_run: bool = False, fit: Fit = fit) -> dict[str, Any]:
    """Train `job` and return the content of `result.json`; `fit` starts the workers and waits for them.

    The same `run.name` and `run.storage` resume; a finished run returns its result at once. With
    `dry_run` nothing starts. Raises `ConfigError` for a run of that name with other settings, or workers
    that the cluster cannot place, `TrainingFailedError` or another `FinhpcError` when training fails.
    """
    begin = time.perf_counter()
    config = job.config
    folder = RunFolder(config.run.storage, config.run.name)
    job.check_checkpoints(folder.path / "checkpoints")
    _check_resume(job, folder)
    total = known_resources()
    if total is not None:
        check_fits(config, use_cuda(config, total), total)
    if note := config.optimizer.shortened(config.train.steps):
        log.info(note)
    if dry_run:
        return job.dry_run(total)
    if not _is_done(folder.result(), config):
        check_ray()
    with folder.lock(), terminable():
        _check_resume(job, folder)  # again: now nobody else writes
        _set_aside_other_settings(job, folder)
        before = folder.result()
        folder.write_config(config, *job.fingerprints)
        environment = folder.write_environment()
        for name in (FATAL, MEMORY):
            (folder.path / name).unlink(missing_ok=True)
        (folder.path / ROOM).write_bytes(bytes(ROOM_BYTES))
        done = _is_done(before, config)
        if not done:
            job.make_ready(folder.path)
        final = _tracked(job, folder, environment, fit, before if done else None, begin)
    summary_table(f"{job.verb} {config.run.name}", outcome.summary(job, final))
    return final


def _tracked(
    job: Job,
    folder: RunFolder,
    environment: dict[str, Any],
    fit: Fit,
    before: dict[str, Any] | None,
    begin: float,
) -> dict[str, Any]:
    """Train, and tell MLflow and the person at the screen; of a run that is finished, `before` is its result."""
    config = job.config
    # Ray is left last: it may end this process, and a stopped job has little time to write down how it ended.
    screen = Progress(config.train.steps, folder.path, eval_every=config.train.eval_every)
    with ExitStack() as ray, screen:
        tracker = _tracker(job, folder, environment).start()
        status: Status = "FAILED"
        result = before
        try:
            if before is not None:
                log.info(f"run {config.run.name} is finished; this is its result (another run.name trains anew).")
            else:
                _train(job, folder, fit, ray)
                collected = outcome.collect(job, folder.path, time.perf_counter() - begin)
                job.finish(collected, folder.path)
                outcome.check(job, folder.path, collected)
                result = collected
            status = "FINISHED"
        except Pruned:
            status = "KILLED"
            log.info("ended by the sweep's scheduler")
            raise
        except (KeyboardInterrupt, Terminated):
            status = "KILLED"
            log.info(_where_it_goes_on(folder))
            raise
        finally:
            final = result or outcome.unfinished(job, folder.path, status)
            _conclude(folder, tracker, status, final)
    return final


def _where_it_goes_on(folder: RunFolder) -> str:
    saved = list_complete(folder.path / "checkpoints")
    if saved:
        return f"stopped; the same command goes on from the checkpoint of step {saved[0].step}."
    return "stopped before a first checkpoint was complete; the same command begins at step 0."


def _conclude(folder: RunFolder, tracker: Tracker, status: Status, final: dict[str, Any]) -> None:
    """Write the result, tell MLflow; of a run that failed, as far as the disk allows."""
    done = status == "FINISHED"
    try:
        (folder.path / ROOM).unlink(missing_ok=True)
        final |= {"mlflow_run_id": tracker.run_id, "tracking_uri": tracker.uri}
        folder.write_result(final)
        logged = {key: value for key, value in final.items() if key not in ("sample", "data", "scores")}
        tracker.finish(status, logged, folder.path / "model" if done else None, timeout_s=60 if done else 15)
        final["mlflow_run_id"] = tracker.run_id
        folder.write_result(final)
    except OSError as error:  # must not hide why the run failed
        if done:
            raise
        log.info(f"{folder.path}/result.json could not be written ({error.strerror}).")


def tell_mlflow(job: Job, folder: RunFolder, status: Status) -> dict[str, Any]:
    """Send what MLflow missed of a run that ended; returns its result, with what MLflow says added."""
    environment = json.loads((folder.path / "environment.json").read_text(encoding="utf-8"))
    result = folder.result() or outcome.unfinished(job, folder.path, status)
    _conclude(folder, _tracker(job, folder, environment).start(), status, result)
    return result


def _check_resume(job: Job, folder: RunFolder) -> None:
    """Refuse settings that differ from what was trained; where nothing was, there is nothing to differ from."""
    if list_complete(folder.path / "checkpoints"):
        folder.check_resume(job.config, *job.fingerprints)


def _set_aside_other_settings(job: Job, folder: RunFolder) -> None:
    """Keep what a start with other settings reported, under another name: its numbers are of another run."""
    try:
        folder.check_resume(job.config, *job.fingerprints)
    except ConfigError:
        job.forget(folder.path)
        for name in (WORKER_FILE, DRIVER_FILE, "mlflow.json", "result.json"):
            path = folder.path / name
            if path.exists():
                path.rename(folder.path / f"{name}.until-{time.strftime('%Y%m%d-%H%M%S')}")


def _train(job: Job, folder: RunFolder, fit: Fit, ray: ExitStack) -> None:
    """Train on the cluster, which is connected until `ray` is left."""
    config = job.config
    log.info("starting Ray and the workers (10 to 30 s)")
    ray.enter_context(ray_cluster())
    total = cluster_resources()
    cuda = use_cuda(config, total)
    check_fits(config, cuda, total)
    parallel, device = config.parallel, "GPU" if cuda else "CPU"
    log.info(
        f"{device} workers: {parallel.workers} (stages {parallel.stages} x replicas {parallel.replicas}), "
        f"torch threads a worker: {config.resources.threads}, precision: {config.train.precision}"
    )
    if cuda and config.train.precision == "fp32":
        log.info(
            "train.precision=fp32 on a GPU: matrix products at an eighth to a sixteenth of the rate of bf16 (A100: "
            "19.5 of 312 TFLOP/s); --train.precision bf16 keeps weights and optimizer in float32."
        )
    fit(job, folder, cuda)


def _tracker(job: Job, folder: RunFolder, environment: dict[str, Any]) -> Tracker:
    config = job.config
    data, model = job.fingerprints
    tags = {
        "mlflow.source.name": f"finhpc {job.verb}",
        "mlflow.source.git.commit": environment.get("git_commit"),
        HIDDEN + "verb": job.verb,
        HIDDEN + "dataset_fingerprint": data,
        HIDDEN + "model_fingerprint": model,
        HIDDEN + "started_from": config.model.path and origin(config.model.path),
        **setting_tags(config),
        **job.tags,
    }
    run = config.run
    given = {key: value for key, value in tags.items() if value not in (None, "")}
    params = job.parameters()
    return Tracker(folder.path, run.mlflow_uri, run.experiment, run.name, params, given, datasets=job.datasets)


def _is_done(before: dict[str, Any] | None, config: TrainingConfig) -> bool:
    return bool(before) and before["status"] == "finished" and before["steps"] >= config.train.steps  # type: ignore[index]
