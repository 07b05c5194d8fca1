"""One start of the workers under Ray Train, watched: what failed, in one line, with what to do about it."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finhpc.cluster.connect import dead_process
from finhpc.cluster.own_ray import ray_logs
from finhpc.cluster.package import Driver
from finhpc.errors import NonFiniteError, OutOfMemoryError, TrainingFailedError
from finhpc.runs.folder import RunFolder
from finhpc.runs.job import Job
from finhpc.runs.watch import Waiting, placed_whenever
from finhpc.runs.worker import FATAL, train_worker
from finhpc.training import watchdog
from finhpc.training.allocator import ENVIRONMENT
from finhpc.training.journal import WORKER_FILE, read

log = logging.getLogger(__name__)

POLL_S = 0.2
HEALTH_TIMEOUT = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"
TORCH_TIMEOUT_S = 1800  # torch's own, where the user wants no limit
STARTS_TRIED = 3  # of workers that cannot even start; Ray Train would try for ever
ENDING_S = 2.0  # for the controller to end when told to; a stopped job has 3 s in all by default
GRACE_S = 10.0  # for workers to return after they wrote that all is done


def fit(job: Job, folder: RunFolder, cuda: bool, look: Callable[[], None] | None = None) -> None:
    """Train until the last step; restarts failed workers. Raises `TrainingFailedError` when that does not help.

    `look` is called again and again meanwhile; what it raises ends the training.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from finhpc.cluster.network import NodeTorchConfig

    config = job.config
    for name in ("ray.train", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    resources = worker_share(job, cuda)
    hang_s = config.train.hang_timeout_s
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=worker_arguments(job, folder, cuda),
        torch_config=NodeTorchConfig(
            backend="nccl" if cuda else "gloo",
            timeout_s=round(torch_timeout_s(hang_s)),
        ),
        scaling_config=ScalingConfig(num_workers=config.parallel.workers, use_gpu=cuda, resources_per_worker=resources),
        run_config=RunConfig(
            # Ray's own record of the run: a new one each time, because the run's state is our checkpoints.
            name=f"attempt-{int(time.time() * 1000)}",
            storage_path=str(folder.path / "ray"),
            failure_config=FailureConfig(
                max_failures=config.run.max_failures, controller_failure_limit=STARTS_TRIED - 1
            ),
            worker_runtime_env={} if cuda else {"env_vars": ENVIRONMENT},
        ),
    )
    around = Around(job, folder, resources, look)
    with _health_timeout(hang_s), placed_whenever():
        problem = watched(trainer.fit, around, AllDone(folder.path / WORKER_FILE, config.train.steps))
    raise_fatal(job, folder)
    if problem is not None:
        raise TrainingFailedError(
            f"the workers failed more than run.max_failures={config.run.max_failures} times; the last error: "
            f"{around.cause(problem)}\nlogs: {folder.path / 'ray'} and Ray's own, {ray_logs()}/train. The same command "
            "resumes from the newest checkpoint."
        )


class Around:
    """What is looked at again and again while workers train: stacks of those that hang, room for all, `look`."""

    def __init__(self, job: Job, folder: RunFolder, each: dict[str, float], look: Callable[[], None] | None) -> None:
        self.job, self.look = job, look
        self.stacks = _Stacks(folder.path)
        self.waiting = Waiting(job.config.parallel.workers, each)

    def __call__(self) -> None:
        self.stacks()
        self.waiting()
        if self.look is not None:
            self.look()

    def cause(self, problem: Exception) -> str:
        """Why the workers failed, in words, with what to do about it."""
        return self.stacks.newest() or _describe(problem, self.job)


def torch_timeout_s(hang_s: float) -> float:
    """How long workers wait for each other: never shorter than the watchdog, which says where they stood."""
    return watchdog.START_FACTOR * hang_s if hang_s else TORCH_TIMEOUT_S


def worker_share(job: Job, cuda: bool) -> dict[str, float]:
    """What Ray reserves for a worker."""
    resources = job.config.resources
    return {"CPU": resources.cpus_per_worker} | ({"GPU": resources.gpus_per_worker} if cuda else {})


def worker_arguments(job: Job, folder: RunFolder, cuda: bool) -> dict[str, Any]:
    """What `train_worker` is told."""
    config = job.config.model_dump(mode="json")
    told = {"config": config, "folder": str(folder.path), "cuda": cuda, "job": type(job)}
    return told | {"driver": Driver.here(), "fingerprint": job.fingerprints[0]}


def raise_fatal(job: Job, folder: RunFolder) -> None:
    """Raise `TrainingFailedError` where a worker wrote why another start would not help."""
    fatal = folder.path / FATAL
    if fatal.exists():
        raise TrainingFailedError(_with_advice(json.loads(fatal.read_text()), job))


@contextmanager
def _health_timeout(hang_s: float) -> Iterator[None]:
    """How long Ray Train waits for a worker whose process does not answer at all (a stopped one, alone).

    Longer than the watchdogs of its neighbours wait, so that their stacks are written. The user's own
    setting stands.
    """
    if HEALTH_TIMEOUT in os.environ or not hang_s:
        yield
        return
    os.environ[HEALTH_TIMEOUT] = str(2 * hang_s)
    try:
        yield
    finally:
        os.environ.pop(HEALTH_TIMEOUT, None)


class _Stacks:
    """Tells the user of each worker that ended itself because nothing moved."""

    def __init__(self, run: Path) -> None:
        self.folder = run / watchdog.FOLDER
        self.seen = self._written()
        self.told = -math.inf, ""

    def __call__(self) -> None:
        for path in sorted(self._written() - self.seen):
            self.seen.add(path)
            self.told = time.monotonic(), f"{path.read_text().partition(';')[0]}; its stacks are in {path}"
            log.info(f"{self.told[1]}. The workers start again.")

    def newest(self) -> str | None:
        """What was told in the last minute: the cause of a failure that came then."""
        self()
        return self.told[1] if time.monotonic() - self.told[0] < 60 else None

    def _written(self) -> set[Path]:
        return {path for path in self.folder.glob("rank-*.txt") if path.stat().st_size}


class AllDone:
    """Whether the workers wrote some time ago that every step is taken and saved.

    A worker that stands still after that (stopped, swapped out) has nothing that is still wanted; Ray Train
    would wait for it and start all of them again.
    """

    def __init__(self, journal: Path, steps: int) -> None:
        self.journal, self.steps, self.since = journal, steps, math.inf
        _, self.offset = read(journal)  # what earlier starts wrote does not count

    def __call__(self) -> bool:
        records, self.offset = read(self.journal, self.offset)
        if any(record["kind"] == "finished" and record["step"] >= self.steps for record in records):
            self.since = min(self.since, time.monotonic())
        return time.monotonic() - self.since > GRACE_S


def watched(work: Callable[[], object], look: Callable[[], None], done: Callable[[], bool]) -> Exception | None:
    """Run `work` beside the main thread, which stays free for signals and looks around; returns what it raised.

    A signal handler that raises inside Ray's own waiting is swallowed there. When `done` says so, `work` is
    ended. Raises `TrainingFailedError` when a process of Ray's own died, for which Ray would wait for
    minutes and then end this process.
    """
    raised: list[Exception] = []

    def run() -> None:
        try:
            work()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True, name="ray-train")
    thread.start()
    try:
        while thread.is_alive():
            thread.join(POLL_S)
            look()
            if done():
                return None
            if name := dead_process():
                log.info(
                    f"Ray's process {name} died; stopping."
                )  # now: Ray may end this process before the error is shown
                raise TrainingFailedError(
                    f"Ray's process {name} died (killed, or out of memory?), and with it the workers. "
                    "The same command resumes from the newest checkpoint."
                )
    finally:
        _end_training(thread)
    return raised[0] if raised else None


def _end_training(thread: threading.Thread) -> None:
    """End Ray Train's workers and controller, if they still work; the thread that waits for them returns.

    Ray ends the whole process, at once and without a word of ours, when a thread still waits for something
    after Ray was left. The controller has no name, only `trainer.fit` knows it.
    """
    import ray

    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None and thread.is_alive() and dead_process() is None:
        controller = frame.f_locals.get("controller")
        if isinstance(controller, ray.actor.ActorHandle):
            controller.abort.remote()
            thread.join(ENDING_S)
            if thread.is_alive():  # it does not listen, as while it waits for room
                ray.kill(controller)
                thread.join(ENDING_S)
            return
        frame = frame.f_back


def _describe(problem: Exception, job: Job) -> str:
    """The heart of what Ray Train raises, without its traceback; with advice where memory ran out."""
    failures: dict[int, Exception] = getattr(problem, "worker_failures", None) or {0: problem}
    texts = {rank: str(error) for rank, error in failures.items()}
    for rank, text in texts.items():
        if "OutOfMemoryError" in text or "memory monitor" in text or "due to the node running low on memory" in text:
            return f"worker {rank} was ended by Ray because the machine ran low on memory; {job.memory_advice()}"
        if re.search(r"SIGKILL|killed by.*OOM|OOM killer", text):
            return (
                f"worker {rank} was killed from outside, most often by the kernel when memory runs out; if so, "
                f"{job.memory_advice()}"
            )
    return last_line(failures[min(failures)])


def last_line(problem: Exception) -> str:
    """The last line of what an exception says, where Ray puts the cause."""
    lines = [line for line in str(problem).strip().splitlines() if line.strip()]
    return lines[-1] if lines else type(problem).__name__


def _with_advice(fatal: dict[str, Any], job: Job) -> str:
    """The worker's message, and what to change where the settings are the cause."""
    message = str(fatal["message"])
    if fatal["error"] == OutOfMemoryError.__name__:
        return f"{message}; {job.memory_advice()}"
    if fatal["error"] != NonFiniteError.__name__:
        return message
    optimizer = job.config.optimizer
    return (
        f"{message} is not finite; the step was not taken and the checkpoints before it stand. Lower "
        f"optimizer.lr (now {optimizer.lr:g}), raise optimizer.warmup_steps (now {optimizer.warmup_steps}) or set "
        f"optimizer.grad_clip (now {optimizer.grad_clip:g}), under another run.name."
    )
