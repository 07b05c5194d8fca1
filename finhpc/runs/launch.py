"""Start the workers of a run and wait for them: by Ray Train, or in this process.

`finhpc.runs.launch_warm` is a third way, for the pipelines of a sweep.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from finhpc.cluster.own_ray import ray_logs
from finhpc.cluster.package import Driver
from finhpc.cluster.tasks import run_tasks
from finhpc.errors import NonFiniteError, OutOfMemoryError, TrainingFailedError
from finhpc.runs.folder import RunFolder
from finhpc.runs.job import Job
from finhpc.runs.watch import Watcher, watch
from finhpc.runs.worker import FATAL, OnEval, train_worker, use_model
from finhpc.training.allocator import ENVIRONMENT
from finhpc.training.watchdog import START_FACTOR
from finhpc.training.workers import stop

log = logging.getLogger(__name__)

TORCH_TIMEOUT_S = 1800  # torch's own default, for runs without a limit
STARTS_TRIED = 3  # of workers that cannot even start; Ray Train would try forever
START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
HEALTH_TIMEOUT = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"
JOB_END_S = 5.0  # for Ray, the result and MLflow, once the workers have returned
NO_LIMIT_S = 365 * 24 * 3600


UseModel = Callable[[], dict[str, Any]]  # calls the job's `use_model` where a worker has run


def launch(job: Job, folder: RunFolder, cuda: bool) -> UseModel:
    """Train to the last step with Ray Train, which restarts failed workers `run.max_failures` times.

    Returns a function that uses the model in a Ray task with the resources of a worker. Raises `TrainingFailedError`
    if restarts do not help.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from finhpc.cluster.network import NodeTorchConfig

    config = job.config
    for name in ("ray.train", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    hang_s = config.train.hang_timeout_s
    share, arguments = worker_share(job, cuda), worker_arguments(job, folder, cuda)
    ray_trainer = TorchTrainer(
        train_worker,
        train_loop_config=arguments,
        torch_config=NodeTorchConfig(backend="nccl" if cuda else "gloo", timeout_s=round(_torch_timeout_s(hang_s))),
        scaling_config=ScalingConfig(num_workers=config.parallel.workers, use_gpu=cuda, resources_per_worker=share),
        run_config=RunConfig(
            # Ray's own record of the run: a new one each time, because our checkpoints are the run's state.
            name=f"attempt-{int(time.time() * 1000)}",
            storage_path=str(folder.path / "ray"),
            failure_config=FailureConfig(
                max_failures=config.run.max_failures, controller_failure_limit=STARTS_TRIED - 1
            ),
            worker_runtime_env={} if cuda else {"env_vars": ENVIRONMENT},
        ),
    )
    watcher = Watcher(job, folder, share)

    def ask_to_end() -> float:
        grace_s = stop_grace_s(config.run.stop_grace_s)
        if not (watcher.has_trained and grace_s):  # nothing to save, or no time
            return 0.0
        stop.request(folder.path)
        log.info("stopping: the workers save a checkpoint after the current step; another signal ends without it.")
        return grace_s

    with ray_train_limits(hang_s):
        error = watch(ray_trainer.fit, watcher.poll, ask_to_end)
    raise_fatal(job, folder)
    if error is not None:
        raise failed_too_often(job, watcher.cause(error), f"{folder.path / 'ray'} and Ray's own, {ray_logs()}/train")
    return partial(use_in_task, arguments, share)


def use_in_task(arguments: dict[str, Any], share: dict[str, float]) -> dict[str, Any]:
    """Call `use_model` in a Ray task that reserves what a worker does."""

    def name(arguments: dict[str, Any]) -> str:
        return f"using the model of {arguments['folder']}"

    tasks = run_tasks(use_model, [arguments], name, 1, share["CPU"], share.get("GPU", 0))
    return next(result for _, result in tasks)


def stop_grace_s(wanted_s: float) -> float:
    """The seconds that workers have to save a checkpoint; a stopped Ray job is killed some time after it was asked."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
        return wanted_s
    return min(wanted_s, max(0.0, float(os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", "3")) - JOB_END_S))


def launch_here(job: Job, folder: RunFolder, cuda: bool, on_eval: OnEval) -> UseModel:
    """Train a run of one worker in this process, which saves a sweep's trials ten seconds of starting processes.

    `on_eval` receives each evaluation except the last; an exception it raises ends the run. Raises
    `TrainingFailedError` for a user's mistake.
    """
    arguments = worker_arguments(job, folder, cuda)
    try:
        train_here(arguments, on_eval)
    finally:
        raise_fatal(job, folder)
    return partial(use_model, arguments)


def train_here(
    arguments: dict[str, Any], on_eval: OnEval | None = None, world_rank: int = 0, workers: int = 1, store: Any = None
) -> None:
    """Run worker `world_rank` of `workers` in this process, in Ray Train's local mode.

    `store`: the `torch.distributed.Store` at which the workers meet.
    """
    cuda = arguments["cuda"]
    os.environ["DS_ACCELERATOR"] = "cuda" if cuda else "cpu"  # read when DeepSpeed is imported
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    from finhpc.training.engine import process_group

    def work(arguments: dict[str, Any]) -> None:
        train_worker(arguments, on_eval)

    scaling = ScalingConfig(num_workers=0, use_gpu=cuda)
    ray_trainer = TorchTrainer(work, train_loop_config=arguments, scaling_config=scaling)
    timeout_s = _torch_timeout_s(arguments["config"]["train"]["hang_timeout_s"])
    with process_group("nccl" if cuda else "gloo", world_rank, workers, store, timeout_s):
        ray_trainer.fit()


def worker_share(job: Job, cuda: bool) -> dict[str, float]:
    """The resources that Ray reserves for one worker."""
    resources = job.config.resources
    return {"CPU": resources.cpus_per_worker} | ({"GPU": resources.gpus_per_worker} if cuda else {})


def worker_arguments(job: Job, folder: RunFolder, cuda: bool) -> dict[str, Any]:
    """The arguments of `train_worker`."""
    return {
        "job_class": type(job),
        "config": job.config.model_dump(mode="json"),
        "folder": str(folder.path),
        "cuda": cuda,
        "driver": Driver.here(),
        "fingerprint": job.fingerprints[0],
    }


def raise_fatal(job: Job, folder: RunFolder) -> None:
    """Raise `TrainingFailedError` if a worker reported an error that a restart would only repeat."""
    path = folder.path / FATAL
    if not path.exists():
        return
    fatal = json.loads(path.read_text())
    message = str(fatal["message"])
    if fatal["error"] == OutOfMemoryError.__name__:
        message += f"; {job.memory_advice()}"
    elif fatal["error"] == NonFiniteError.__name__:
        optimizer = job.config.optimizer
        message += (
            " is not finite; the step was not taken and earlier checkpoints are intact. Lower optimizer.lr (now "
            f"{optimizer.lr:g}), raise optimizer.warmup_steps (now {optimizer.warmup_steps}) or set "
            f"optimizer.grad_clip (now {optimizer.grad_clip:g}), under another run.name."
        )
    raise TrainingFailedError(message)


def failed_too_often(job: Job, cause: str, logs: str) -> TrainingFailedError:
    return TrainingFailedError(
        f"the workers failed more than run.max_failures={job.config.run.max_failures} times; the last error: "
        f"{cause}\nlogs: {logs}. The same command resumes from the newest checkpoint."
    )


@contextmanager
def ray_train_limits(hang_s: float) -> Iterator[None]:
    """Set two of Ray Train's time limits, unless the user set them in the environment.

    Waiting for CPUs and GPUs may take as long as it takes: Ray Train's minute is over before a lost node is back,
    and three such minutes would end the run. A worker whose process does not answer (a stopped one) ends the start
    only after its neighbors' watchdogs have written their stacks.
    """
    limits = {START_TIMEOUT: str(NO_LIMIT_S)} | ({HEALTH_TIMEOUT: str(2 * hang_s)} if hang_s else {})
    ours = {name: limit for name, limit in limits.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


def _torch_timeout_s(hang_s: float) -> float:
    """How long workers wait for each other: never shorter than the watchdog, which reports where they stood."""
    return START_FACTOR * hang_s if hang_s else TORCH_TIMEOUT_S
