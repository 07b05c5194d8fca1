"""Watch workers while they train: hangs, missing resources, a Ray process that died, the end."""

from __future__ import annotations

import logging
import math
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from finhpc.cluster import watched
from finhpc.cluster.connect import dead_process
from finhpc.cluster.own_ray import ray_node
from finhpc.runs.folder import RunFolder
from finhpc.runs.job import Job
from finhpc.training import watchdog
from finhpc.training.journal import WORKER_FILE, read

log = logging.getLogger(__name__)

RESUMES = ", and with it the workers. The same command resumes from the newest checkpoint."
RESOURCES_POLL_S = 2.0
PATIENCE_S = 4.0  # a placement on free nodes takes less
END_S = 2.0  # for Ray Train's controller to end on request; a stopped job has 3 s in all by default
GRACE_S = 10.0  # for workers to return after they reported the last step
RECENT_S = 60.0  # a hang explains a failure that came at most this much later


def watch(
    work: Callable[[], object], poll: Callable[[], bool | None], ask_to_end: Callable[[], float] = lambda: 0.0
) -> Exception | None:
    """Run `work`, which trains, as `finhpc.cluster.watched` does; at the end, workers that still train are ended."""
    return watched.watch(work, poll, RESUMES, ask_to_end, _end_training)


def _end_training(thread: threading.Thread, ended: threading.Event) -> None:
    """End Ray Train's workers and controller if they still work, so that the thread waiting for them returns.

    Ray ends the whole process without a message if a thread still waits for something after Ray was left. The
    controller has no name; only the frame of `trainer.fit` holds it.
    """
    import ray

    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None and not ended.is_set() and dead_process() is None:
        controller = frame.f_locals.get("controller")
        if isinstance(controller, ray.actor.ActorHandle):
            controller.abort.remote()
            if not ended.wait(END_S):  # it does not listen, for instance while it waits for resources
                ray.kill(controller)
                ended.wait(END_S)
            break
        frame = frame.f_back
    if ended.is_set():
        thread.join()


class Watcher:
    """Reports what happens to the workers of one start. `share`: the resources that Ray reserves for a worker.

    `also` is called at every poll; an exception it raises ends the training.
    """

    def __init__(
        self, job: Job, folder: RunFolder, share: dict[str, float], also: Callable[[], None] | None = None
    ) -> None:
        self.job, self.also = job, also
        self.stacks_folder, self.journal = folder.path / watchdog.FOLDER, folder.path / WORKER_FILE
        self.reported = self._stack_files()
        self.hang, self.hang_time = "", -math.inf
        _, self.offset = read(self.journal)  # records of earlier starts do not count
        self.finished_time = math.inf
        self.has_trained = False  # a step or more
        self.needed = {name: job.config.parallel.workers * amount for name, amount in share.items()}
        self.next_look = time.monotonic() + PATIENCE_S
        self.waiting_since: float | None = None
        self.waiting_for = ""

    def poll(self) -> bool:
        """Report what changed; True when the workers reported the last step and had `GRACE_S` to return.

        A worker that hangs after that (stopped, swapped out) is not needed any more; Ray Train would wait for it and
        start all of them again.
        """
        self._report_hangs()
        self._report_waiting()
        if self.also is not None:
            self.also()
        records, self.offset = read(self.journal, self.offset)
        self.has_trained |= any(record["kind"] == "train" for record in records)
        if any(record["kind"] == "finished" for record in records):
            self.finished_time = min(self.finished_time, time.monotonic())
        return time.monotonic() - self.finished_time > GRACE_S

    def cause(self, error: Exception) -> str:
        """Why the workers failed, with advice: a recent hang, or the core of what Ray Train raised."""
        self._report_hangs()
        if time.monotonic() - self.hang_time < RECENT_S:
            return self.hang
        failures: dict[int, Exception] = getattr(error, "worker_failures", None) or {0: error}
        for rank, failure in failures.items():
            text = str(failure)
            if re.search("OutOfMemoryError|memory monitor|due to the node running low on memory", text):
                return (
                    f"worker {rank} was ended by Ray because the machine ran low on memory; {self.job.memory_advice()}"
                )
            if re.search(r"SIGKILL|killed by.*OOM|OOM killer", text):
                return (
                    f"worker {rank} was killed from outside, most often by the kernel when memory runs out; if so, "
                    f"{self.job.memory_advice()}"
                )
        return last_line(failures[min(failures)])

    def _stack_files(self) -> set[Path]:
        """Files of workers that ended themselves because nothing moved."""
        return {path for path in self.stacks_folder.glob("rank-*.txt") if path.stat().st_size}

    def _report_hangs(self) -> None:
        for path in sorted(self._stack_files() - self.reported):
            self.reported.add(path)
            self.hang = f"{path.read_text().partition(';')[0]}; its stacks are in {path}"
            self.hang_time = time.monotonic()
            log.info(f"{self.hang}. The workers start again.")

    def _report_waiting(self) -> None:
        """Report workers that wait for CPUs or GPUs of a shared cluster, and when they have them."""
        now, node = time.monotonic(), ray_node()
        # The resources of a cluster that this command started for itself were checked then.
        if now < self.next_look or (node is not None and node.is_head()):
            return
        self.next_look = now + RESOURCES_POLL_S
        if not _is_pending(self.job.config.parallel.workers):
            if self.waiting_for:
                log.info(f"the workers have their resources again, after {now - (self.waiting_since or now):.0f} s.")
            self.waiting_since, self.waiting_for = None, ""
            return
        import ray

        self.waiting_since = self.waiting_since or now
        lack = missing(self.needed, dict(ray.cluster_resources()), dict(ray.available_resources()))
        if now - self.waiting_since >= PATIENCE_S and lack != self.waiting_for:
            self.waiting_for = lack
            log.info(f"the workers wait for resources: {lack}. The run continues by itself; stopping it is safe.")


def missing(needed: dict[str, float], total: dict[str, float], free: dict[str, float]) -> str:
    """Which of the needed resources the cluster lacks, in words."""
    words = []
    for name, amount in needed.items():
        has, left = total.get(name, 0), free.get(name, 0)
        if has < amount:
            words.append(f"they need {amount:g} {name}, the cluster has {has:g} (is a node gone?)")
        elif left < amount:
            words.append(f"they need {amount:g} {name}, of the cluster's {has:g} only {left:g} are free")
    return "; ".join(words) or "the free CPUs and GPUs are not on the nodes where workers need them"


def last_line(error: Exception) -> str:
    """The last line of an exception's message, where Ray puts the cause."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _is_pending(workers: int) -> bool:
    """Whether a placement group of that many workers of this driver has no place yet."""
    import ray

    job = ray.get_runtime_context().get_job_id()  # a group's id ends in its driver's
    groups = ray.util.placement_group_table().items()
    return any(
        key.endswith(job) and len(group["bundles"]) == workers and group["state"] in ("PENDING", "RESCHEDULING")
        for key, group in groups
    )
