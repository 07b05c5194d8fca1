"""Start a run's workers in processes that stay for the next run: the pipelines of a sweep.

Under Ray Train every run starts new processes, which import torch and DeepSpeed again: 12 s and more per trial on two
cores. A group of actors does that once. A worker that fails ends the group; the next group continues from the newest
checkpoint, as under Ray Train.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

from finhpc.cluster.own_ray import ray_logs
from finhpc.cluster.tasks import attempt
from finhpc.errors import FinhpcError
from finhpc.runs.folder import RunFolder
from finhpc.runs.job import Job
from finhpc.runs.launch import (
    UseModel,
    failed_too_often,
    raise_fatal,
    train_here,
    worker_arguments,
    worker_environment,
    worker_share,
)
from finhpc.runs.watch import Watcher, watch
from finhpc.runs.worker import use_model

log = logging.getLogger(__name__)

DEATH_S = 10  # how long after a worker's error Ray may take to notice that another one has died
GROUPS: list[WarmGroup] = []  # of this process, at most one


def launch_warm(job: Job, folder: RunFolder, cuda: bool, poll: Callable[[], None]) -> UseModel:
    """Train to the last step with this process's group; a failed group is replaced `run.max_failures` times.

    `poll` is called again and again meanwhile; an exception it raises ends the training. Raises `TrainingFailedError`.
    """
    config, share = job.config, worker_share(job, cuda)
    arguments = worker_arguments(job, folder, cuda)
    watcher = Watcher(job, folder, share, poll)
    failures = 0
    while True:
        group = _group(config.parallel.workers, share, folder.path.parent)
        try:
            error = watch(partial(group.train, arguments), watcher.poll)
        finally:
            if not group.idle:  # failed, stopped, or a worker that never returned
                group.shutdown()
        raise_fatal(job, folder)
        if error is None:
            return partial(group.use_model, arguments)
        cause = watcher.cause(error)
        if failures == config.run.max_failures:
            raise failed_too_often(job, cause, f"Ray's own, {ray_logs()}")
        log.info(f"{cause}; the workers start again.")
        failures += 1


def free_resources(runs: Path) -> None:
    """Free what groups of ended processes reserved for the runs in the folder `runs`.

    Ray frees the placement group of an actor only when the actor and its driver have both ended, so after a sweep a
    notebook would have fewer CPUs.
    """
    import ray
    from ray._raylet import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    for key, group in ray.util.placement_group_table().items():
        if group["name"].startswith(f"{runs}:") and group["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(key)))


def _group(size: int, share: dict[str, float], runs: Path) -> WarmGroup:
    """This process's group if it fits; otherwise a new one in its place."""
    if GROUPS and (len(GROUPS[0].workers), GROUPS[0].share) == (size, share):
        return GROUPS[0]
    if GROUPS:
        GROUPS[0].shutdown()
    GROUPS.append(WarmGroup.start(size, share, runs))
    return GROUPS[0]


class GroupFailedError(Exception):
    """`worker_failures`: rank -> exception of the worker that failed, as in Ray Train's error.

    That is the one whose process died, if one did, else the `first` that failed.
    """

    def __init__(self, first: int, failures: dict[int, Exception]) -> None:
        from ray.exceptions import RayActorError

        rank = next((rank for rank, error in failures.items() if isinstance(error, RayActorError)), first)
        self.worker_failures = {rank: failures[rank]}
        super().__init__(str(failures[rank]))


class WarmWorker:
    """The actor of one worker."""

    def open_store(self) -> tuple[str, int]:
        """Open the store at which the workers meet for one training; return its address."""
        import ray
        import torch.distributed as dist

        address = ray.util.get_node_ip_address()
        self.store: Any = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
        return address, self.store.port

    def train(self, arguments: dict[str, Any], world_rank: int, workers: int, store: tuple[str, int]) -> None:
        import torch.distributed as dist

        from finhpc.cluster.network import use_interface_of_node

        use_interface_of_node()
        opened = self.store if world_rank == 0 else dist.TCPStore(*store, is_master=False)  # type: ignore[attr-defined]
        train_here(arguments, world_rank=world_rank, workers=workers, store=opened)

    def use_model(self, arguments: dict[str, Any]) -> dict[str, Any] | FinhpcError:
        return attempt(use_model, arguments, f"using the model of {arguments['folder']}", arguments["driver"])


@dataclass
class WarmGroup:
    """`workers`: an actor per rank, placed in `placement`. `share`: the resources that Ray reserves for each."""

    share: dict[str, float]
    placement: Any
    workers: list[Any] = field(default_factory=list)
    idle: bool = True

    @staticmethod
    def start(size: int, share: dict[str, float], runs: Path) -> WarmGroup:
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        name = f"{runs}:{uuid4()}"  # by which `free_resources` knows it; Ray wants each name once
        group = WarmGroup(share, placement_group([share] * size, strategy="PACK", name=name))
        for i in range(size):
            place = PlacementGroupSchedulingStrategy(group.placement, placement_group_bundle_index=i)
            options = {"num_cpus": share["CPU"], "num_gpus": share.get("GPU", 0), "scheduling_strategy": place}
            options["runtime_env"] = {"env_vars": worker_environment("GPU" in share)}
            group.workers.append(ray.remote(WarmWorker).options(**options).remote())
        return group

    def train(self, arguments: dict[str, Any]) -> None:
        """Train once with all workers. Raises `GroupFailedError` if one fails."""
        import ray
        from ray.exceptions import RayActorError

        self.idle = False
        store = ray.get(self.workers[0].open_store.remote())
        size = len(self.workers)
        calls = {worker.train.remote(arguments, rank, size, store): rank for rank, worker in enumerate(self.workers)}
        pending, failures = list(calls), dict[int, Exception]()
        while pending:
            ended, pending = ray.wait(pending, timeout=DEATH_S if failures else None)
            for call in ended:
                try:
                    ray.get(call)
                except Exception as error:
                    failures[calls[call]] = error
            # A process that dies breaks the connections of the others, which may be reported first.
            died = any(isinstance(error, RayActorError) for error in failures.values())
            if died or (failures and not ended):
                break
        if failures:
            raise GroupFailedError(next(iter(failures)), failures)
        self.idle = True

    def use_model(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Use the trained model in the first worker's process."""
        import ray

        result: dict[str, Any] | FinhpcError = ray.get(self.workers[0].use_model.remote(arguments))
        if isinstance(result, FinhpcError):
            raise result
        return result

    def shutdown(self) -> None:
        """End the workers' processes, whatever they do, and free their resources."""
        import ray
        from ray.util.placement_group import remove_placement_group

        for worker in self.workers:
            ray.kill(worker)
        remove_placement_group(self.placement)
        GROUPS.clear()
