"""One training from its settings to its model, resumable at any moment.

`run` reads straight down; `finhpc.runs.launch` starts the workers, each of which runs `finhpc.runs.worker`.
"""

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
from finhpc.runs.folder import RunFolder
from finhpc.runs.job import Job
from finhpc.runs.launch import UseModel, launch
from finhpc.runs.progress import Progress
from finhpc.runs.result import collect, summary, unfinished
from finhpc.runs.worker import FATAL, MEMORY, RESERVE, RESERVE_BYTES
from finhpc.screen import summary_table
from finhpc.tracking.describe import Description, trained_model
from finhpc.tracking.store import check_store
from finhpc.tracking.tags import COMMAND, PREFIX, setting_tags
from finhpc.tracking.tracker import Status, Tracker
from finhpc.training.checkpoint import list_complete
from finhpc.training.journal import DRIVER_FILE, WORKER_FILE, latest, read
from finhpc.training.workers import stop

log = logging.getLogger(__name__)


class Pruned(BaseException):
    """A sweep's scheduler ended the run because other trials are ahead."""


Launch = Callable[[Job, RunFolder, bool], UseModel]
J = TypeVar("J", bound=Job)


def mlflow_checked(job: J) -> J:
    """Return the job if MLflow accepts its run; raise `ConfigError` otherwise, before anything starts."""
    config = job.config
    check_store(config.run.mlflow_uri, config.run.experiment)
    return job


def run(job: Job, launch: Launch = launch) -> dict[str, Any]:
    """Train `job` and return the content of `result.json`.

    `launch` starts the workers, waits for them, and returns a function that uses the trained model where they ran.

    The same `run.name` and `run.storage` resume; a finished run returns its result at once. Raises `ConfigError` for
    a run of that name with other settings, or workers that the cluster cannot place, `TrainingFailedError` or another
    `FinhpcError` when training fails.
    """
    begin = time.perf_counter()
    config = job.config
    folder = RunFolder(config.run.storage, config.run.name)
    check_run(job, folder)
    fingerprints = job.fingerprints  # raises for damaged weights or data, before anything is written
    if not folder.is_finished(config.train.steps):
        check_ray()
    with folder.lock(), terminable():
        _check_resume(job, folder)  # again: now no other process writes
        _set_aside_other_settings(job, folder)
        finished = folder.result() if folder.is_finished(config.train.steps) else None
        folder.write_config(config, *fingerprints)
        environment = folder.write_environment()
        for name in (FATAL, MEMORY):
            (folder.path / name).unlink(missing_ok=True)
        stop.reset(folder.path)
        (folder.path / RESERVE).write_bytes(bytes(RESERVE_BYTES))
        if finished is None:
            job.prepare(folder.path)
        # Ray is left last: it may end this process, and a stopped job has little time to record how it ended.
        with ExitStack() as cluster, Progress(config.train.steps, folder.path, eval_every=config.train.eval_every):
            tracker = _tracker(job, folder, environment).start()
            status: Status = "FAILED"
            result = finished
            try:
                if finished is None:
                    use_model = _train(job, folder, launch, cluster)
                    result = collect(job, folder.path, time.perf_counter() - begin, use_model)
                else:
                    log.info(f"run {config.run.name} is finished; this is its result. Another run.name trains again.")
                status = "FINISHED"
            except Pruned:
                status = "KILLED"
                log.info("ended by the sweep's scheduler")
                raise
            except (KeyboardInterrupt, Terminated):
                status = "KILLED"
                log.info(_how_to_resume(folder))
                raise
            finally:
                final = result or unfinished(job, folder.path, status)
                _conclude(folder, tracker, status, final)
    summary_table(f"{job.command} {config.run.name}", summary(job, final))
    return final


def check_run(job: Job, folder: RunFolder) -> dict[str, float] | None:
    """Check what can be checked before anything starts; return the cluster's resources if they are known."""
    from finhpc.training.compiler import check_compiler

    config = job.config
    job.check_checkpoints(folder.path / "checkpoints")
    _check_resume(job, folder)
    total = known_resources()
    if total is not None:
        cuda = use_cuda(config.resources, total)
        check_fits(config, cuda, total)
        if not cuda:  # a command for GPUs may run on a machine without one: their workers check it
            check_compiler(config.train.compile, "cpu")
    if note := config.optimizer.shortened(config.train.steps):
        log.info(note)
    return total


def send_to_mlflow(job: Job, folder: RunFolder, status: Status) -> dict[str, Any]:
    """Send what MLflow missed of a run that ended; return its result with the MLflow run's id."""
    environment = json.loads((folder.path / "environment.json").read_text(encoding="utf-8"))
    result = folder.result() or unfinished(job, folder.path, status)
    _conclude(folder, _tracker(job, folder, environment).start(), status, result)
    return result


def _check_resume(job: Job, folder: RunFolder) -> None:
    """Refuse settings other than those trained with; before the first checkpoint there is nothing to differ from."""
    if list_complete(folder.path / "checkpoints"):
        folder.check_resume(job.config, *job.fingerprints)


def _set_aside_other_settings(job: Job, folder: RunFolder) -> None:
    """Rename the reports of a start with other settings: their numbers belong to another run."""
    try:
        folder.check_resume(job.config, *job.fingerprints)
    except ConfigError:
        job.discard_prepared(folder.path)
        for name in (WORKER_FILE, DRIVER_FILE, "mlflow.json", "result.json"):
            path = folder.path / name
            if path.exists():
                path.rename(folder.path / f"{name}.until-{time.strftime('%Y%m%d-%H%M%S')}")


def _train(job: Job, folder: RunFolder, launch: Launch, cluster: ExitStack) -> UseModel:
    """Train on the cluster, which stays connected until `cluster` is left."""
    config = job.config
    log.info("starting Ray and the workers (10 to 30 s)")
    cluster.enter_context(ray_cluster())
    total = cluster_resources()
    cuda = use_cuda(config.resources, total)
    check_fits(config, cuda, total)
    parallel, device = config.parallel, "GPU" if cuda else "CPU"
    log.info(
        f"{device} workers: {parallel.workers} (stages {parallel.stages} x replicas {parallel.replicas}), "
        f"torch threads per worker: {config.resources.threads}, precision: {config.train.precision}"
    )
    if cuda and config.train.precision == "fp32":
        log.info(
            "train.precision=fp32 on a GPU: matrix products run at an eighth to a sixteenth of the rate of bf16 (A100: "
            "19.5 of 312 TFLOP/s); --train.precision bf16 keeps weights and optimizer in float32."
        )
    return launch(job, folder, cuda)


def _how_to_resume(folder: RunFolder) -> str:
    checkpoints = list_complete(folder.path / "checkpoints")
    if checkpoints:
        saved, taken = checkpoints[0].step, max(latest(read(folder.path / WORKER_FILE)[0], "train"), default=0)
        if saved == taken:
            return f"stopped after step {saved}, which is saved; the same command continues there."
        return f"stopped; the same command resumes from the checkpoint of step {saved}."
    return "stopped before the first checkpoint was complete; the same command begins at step 0."


def _tracker(job: Job, folder: RunFolder, environment: dict[str, Any]) -> Tracker:
    config = job.config
    data, model = job.fingerprints
    tags = {
        "mlflow.source.name": f"finhpc {job.command}",
        "mlflow.source.git.commit": environment.get("git_commit"),
        COMMAND: job.command,
        PREFIX + "dataset_fingerprint": data,
        PREFIX + "model_fingerprint": model,
        PREFIX + "started_from": config.model.path and trained_model(config.model.path),
        **setting_tags(config),
        **job.tags,
    }
    given = {key: value for key, value in tags.items() if value not in (None, "")}
    uri, experiment = config.run.mlflow_uri, config.run.experiment
    return Tracker(Description(folder.path, uri, experiment, config.run.name, job.parameters(), given, job.datasets))


def _conclude(folder: RunFolder, tracker: Tracker, status: Status, final: dict[str, Any]) -> None:
    """Write the result and end the MLflow run; for a failed run as far as the disk allows."""
    done = status == "FINISHED"
    try:
        (folder.path / RESERVE).unlink(missing_ok=True)
        final |= {"mlflow_run_id": tracker.run_id, "tracking_uri": tracker.uri}
        folder.write_result(final)
        figures = {key: value for key, value in final.items() if key not in ("sample", "data", "scores")}
        tracker.finish(status, figures, folder.path / "model" if done else None, timeout_s=60 if done else 15)
        final["mlflow_run_id"] = tracker.run_id
        folder.write_result(final)
    except OSError as error:  # must not hide why the run failed
        if done:
            raise
        log.info(f"{folder.path}/result.json could not be written ({error.strerror}).")
