"""`finhpc pretrain`: one run from its settings to its model, resumable at any moment."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from finhpc.config import PretrainConfig, flatten
from finhpc.errors import ConfigError
from finhpc.orchestration import outcome
from finhpc.orchestration.cluster import check_fits, cluster_resources, known_resources, ray_cluster, use_cuda
from finhpc.orchestration.fit import fit
from finhpc.orchestration.plan import Plan, check_tokenizer, make_plan
from finhpc.orchestration.progress import Progress, rows_table, summary_table
from finhpc.orchestration.runfolder import RunFolder
from finhpc.orchestration.start import DECOMPOSED, decompose_start, needs_decomposing
from finhpc.orchestration.tracking import Status, Tracker, absolute_tracking_uri, default_tracking_uri
from finhpc.orchestration.worker import FATAL, MEMORY, ROOM, ROOM_BYTES
from finhpc.training.checkpoint import complete
from finhpc.training.journal import DRIVER_FILE, WORKER_FILE

Say = Callable[[str], None]


class Terminated(BaseException):
    """SIGTERM arrived: the run stops here and the same command resumes it."""


def pretrain(config: PretrainConfig, dry_run: bool = False) -> dict[str, Any]:
    """Train a model as `config` says and return the content of `result.json`.

    The same `run.name` and `run.storage` resume; a finished run returns its result at once.
    With `dry_run` everything is checked and counted, and nothing starts. Raises `ConfigError` for
    settings that cannot work, `TrainingFailedError` or another `FinhpcError` when training fails.
    """
    begin = time.perf_counter()
    config = _absolute(config)
    folder = RunFolder(config.run.storage, config.run.name)
    plan = make_plan(config)
    check_tokenizer(config, plan.shards, folder.path / "checkpoints")
    _check_resume(plan, folder)
    total = known_resources()
    if total is not None:
        check_fits(config, use_cuda(config, total), total)
    if dry_run:
        return _dry_run(plan, total)
    with folder.lock(), _terminable():
        _check_resume(plan, folder)  # again: now nobody else writes
        _set_aside_other_settings(plan, folder)
        before = folder.result()
        folder.write_config(config, *_fingerprints(plan))
        environment = folder.write_environment()
        for name in (FATAL, MEMORY):
            (folder.path / name).unlink(missing_ok=True)
        (folder.path / ROOM).write_bytes(bytes(ROOM_BYTES))
        if not (done := _is_done(before, config)) and needs_decomposing(config):
            with ray_cluster(), _terminable():
                decompose_start(config, folder.path)
        with Progress(config.train.steps, folder.path) as progress:
            tracker = _tracker(plan, folder, environment, progress.say).start()
            status: Status = "FAILED"
            result: dict[str, Any] | None = None
            try:
                if done:
                    progress.say(
                        f"run {config.run.name} is finished; this is its result (another run.name trains anew)."
                    )
                    result = before
                else:
                    _train(plan, folder, progress.say)
                    result = outcome.collect(plan, folder.path, time.perf_counter() - begin)
                    result["sample"] = outcome.sample_text(config, folder.path / "model", progress.say)
                status = "FINISHED"
            except (KeyboardInterrupt, Terminated):
                status = "KILLED"
                progress.say("stopped; the same command resumes from the newest checkpoint.")
                raise
            finally:
                final = result or outcome.unfinished(plan, folder.path, status)
                _conclude(folder, tracker, status, final, progress.say)
    summary_table(f"pretrain {config.run.name}", outcome.summary(plan, final))
    return final


def _conclude(folder: RunFolder, tracker: Tracker, status: Status, final: dict[str, Any], say: Say) -> None:
    """Write the result, tell MLflow; of a run that failed, as far as the disk allows."""
    done = status == "FINISHED"
    try:
        (folder.path / ROOM).unlink(missing_ok=True)
        final |= {"mlflow_run_id": tracker.run_id, "tracking_uri": tracker.uri}
        folder.write_result(final)
        logged = {key: value for key, value in final.items() if key != "sample"}
        tracker.finish(status, logged, folder.path / "model" if done else None, timeout_s=60 if done else 15)
        final["mlflow_run_id"] = tracker.run_id
        folder.write_result(final)
    except OSError as error:  # must not hide why the run failed
        if done:
            raise
        say(f"{folder.path}/result.json could not be written ({error.strerror}).")


def _check_resume(plan: Plan, folder: RunFolder) -> None:
    """Refuse settings that differ from what was trained; where nothing was, there is nothing to differ from."""
    if complete(folder.path / "checkpoints"):
        folder.check_resume(plan.config, *_fingerprints(plan))


def _fingerprints(plan: Plan) -> tuple[str, str | None]:
    """Of the data, and of the model it starts from."""
    return plan.shards.manifest.fingerprint, plan.start.fingerprint if plan.start else None


def _set_aside_other_settings(plan: Plan, folder: RunFolder) -> None:
    """Keep what a start with other settings reported, under another name: its numbers are of another run."""
    try:
        folder.check_resume(plan.config, *_fingerprints(plan))
    except ConfigError:
        shutil.rmtree(folder.path / DECOMPOSED, ignore_errors=True)
        for name in (WORKER_FILE, DRIVER_FILE, "mlflow.json", "result.json"):
            path = folder.path / name
            if path.exists():
                path.rename(folder.path / f"{name}.until-{time.strftime('%Y%m%d-%H%M%S')}")


def _train(plan: Plan, folder: RunFolder, say: Say) -> None:
    config = plan.config
    say("starting Ray and the workers (10 to 30 s)")
    with ray_cluster(), _terminable():  # again, because connecting to Ray replaces the handler
        total = cluster_resources()
        cuda = use_cuda(config, total)
        check_fits(config, cuda, total)
        parallel, device = config.parallel, "GPU" if cuda else "CPU"
        say(
            f"{device} workers: {parallel.workers} (stages {parallel.stages} x replicas {parallel.replicas}), "
            f"torch threads a worker: {config.resources.threads}, precision: {config.train.precision}"
        )
        fit(plan, folder, cuda, say)


def _tracker(plan: Plan, folder: RunFolder, environment: dict[str, Any], say: Say) -> Tracker:
    config = plan.config
    params = flatten(config) | {"params_total": plan.params_total, "params_dense": plan.params_dense}
    packages = {f"version.{name}": value for name, value in environment["packages"].items() if value}
    tags = {
        "mlflow.source.name": "finhpc pretrain",
        "mlflow.source.git.commit": environment.get("git_commit"),
        "finhpc.dataset_fingerprint": plan.shards.manifest.fingerprint,
        "finhpc.model_fingerprint": _fingerprints(plan)[1],
        **packages,
    }
    uri = config.run.tracking_uri or default_tracking_uri(config.run.storage)
    return Tracker(
        folder.path, uri, config.run.experiment, config.run.name, params, {k: v for k, v in tags.items() if v}, say
    )


def _absolute(config: PretrainConfig) -> PretrainConfig:
    """The same settings with whole paths: workers run in folders of their own, reruns anywhere."""
    config = config.model_copy(deep=True)
    config.run.storage = os.path.abspath(os.path.expanduser(config.run.storage))
    if config.data.shards:
        config.data.shards = os.path.abspath(os.path.expanduser(config.data.shards))
    if config.model.path:
        config.model.path = os.path.abspath(os.path.expanduser(config.model.path))
    if config.run.tracking_uri:
        config.run.tracking_uri = absolute_tracking_uri(config.run.tracking_uri)
    return config


def _is_done(before: dict[str, Any] | None, config: PretrainConfig) -> bool:
    return bool(before) and before["status"] == "finished" and before["steps"] >= config.train.steps  # type: ignore[index]


def _dry_run(plan: Plan, total: dict[str, float] | None) -> dict[str, Any]:
    """`total`: what this machine or the connected cluster has; None where that is not known yet."""
    from finhpc.orchestration.estimate import of_plan
    from finhpc.orchestration.estimate_tables import plan_summary, stage_rows

    result = outcome.counted(plan) | {"status": "dry_run", "steps": plan.config.train.steps}
    result["tokens"] = plan.config.train.steps * plan.config.parallel.samples_per_step * plan.config.data.seq_len
    cuda = use_cuda(plan.config, total) if total else plan.config.resources.device == "cuda"
    result["estimate"] = of_plan(plan, cuda, here=total is not None)
    title = f"dry run of {plan.config.run.name}"
    summary_table(title, outcome.dry_summary(plan) + plan_summary(result["estimate"]))
    rows_table("memory of a worker by stage in GB, estimated", stage_rows(result["estimate"]["stages"]))
    return result


@contextmanager
def _terminable() -> Iterator[None]:
    """Turn SIGTERM into an exception, so that workers, run and lock are let go in order."""

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread: whoever runs it handles signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
