"""What a run on a cluster waits for while its workers have no place: said, so that silence means work."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)

START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
NO_LIMIT_S = 365 * 24 * 3600
LOOK_S = 2.0
PATIENCE_S = 4.0  # a placement on free nodes takes less


@contextmanager
def placed_whenever() -> Iterator[None]:
    """Let Ray Train wait for CPUs and GPUs as long as it takes; the user's own limit stands.

    Its minute is over before a lost node is back, and three such minutes would end the run.
    """
    if START_TIMEOUT in os.environ:
        yield
        return
    os.environ[START_TIMEOUT] = str(NO_LIMIT_S)
    try:
        yield
    finally:
        os.environ.pop(START_TIMEOUT, None)


class Waiting:
    """Tells the user when workers wait for room on a shared cluster, and when they have it.

    `workers`, `each`: how many, and the CPUs and GPUs that Ray reserves for one.
    """

    def __init__(self, workers: int, each: dict[str, float]) -> None:
        self.needed = {name: workers * amount for name, amount in each.items()}
        self.workers = workers
        self.next_look = time.monotonic() + PATIENCE_S
        self.since: float | None = None
        self.told = ""

    def __call__(self) -> None:
        now = time.monotonic()
        if now < self.next_look or not _shared():
            return
        self.next_look = now + LOOK_S
        if not _pending(self.workers):
            if self.told:
                log.info(f"there is room for the workers again, after {now - (self.since or now):.0f} s.")
            self.since, self.told = None, ""
            return
        self.since = self.since or now
        text = missing(self.needed, *_resources())
        if now - self.since >= PATIENCE_S and text != self.told:
            self.told = text
            log.info(f"the workers wait for room: {text}. The run goes on by itself; it may be stopped and resumed.")


def missing(needed: dict[str, float], total: dict[str, float], free: dict[str, float]) -> str:
    """What of the needed resources the cluster lacks, in words."""
    words = []
    for name, amount in needed.items():
        has, left = total.get(name, 0), free.get(name, 0)
        if has < amount:
            words.append(f"they need {amount:g} {name}, the cluster has {has:g} (is a node gone?)")
        elif left < amount:
            words.append(f"they need {amount:g} {name}, of the cluster's {has:g} only {left:g} are free")
    return "; ".join(words) or "the free CPUs and GPUs do not lie together as the workers need them"


def _shared() -> bool:
    """Whether the cluster is somebody's, not one that this command started for itself and whose room it has checked."""
    from ray._private import worker

    node = getattr(worker, "_global_node", None)
    return node is None or not node.is_head()


def _pending(workers: int) -> bool:
    """Whether a group of that many workers of this driver has no place yet."""
    import ray

    job = ray.get_runtime_context().get_job_id()  # a group's id ends in its driver's
    groups = ray.util.placement_group_table().items()
    return any(
        key.endswith(job) and len(group["bundles"]) == workers and group["state"] in ("PENDING", "RESCHEDULING")
        for key, group in groups
    )


def _resources() -> tuple[dict[str, float], dict[str, float]]:
    import ray

    return dict(ray.cluster_resources()), dict(ray.available_resources())
