"""The workers of a pipeline kept from one trial of a sweep to the next, each an actor that trains by `train_here`.

Under Ray Train every `fit` starts new processes, which import torch and DeepSpeed again: 12 s and more of a trial
on two cores. A group has that behind it after its first trial. A worker that fails ends the group; the next one goes
on from the newest checkpoint, as under Ray Train.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

from finhpc.cluster.own_ray import ray_logs
from finhpc.errors import TrainingFailedError
from finhpc.runs.folder import RunFolder
from finhpc.runs.job import Job
from finhpc.runs.launch import AllDone, Around, raise_fatal, watched, worker_arguments, worker_share
from finhpc.training.allocator import ENVIRONMENT
from finhpc.training.journal import WORKER_FILE

log = logging.getLogger(__name__)

KEPT: list[WarmGroup] = []  # this process's, at most one


def fit_warm(job: Job, folder: RunFolder, cuda: bool, look: Callable[[], None]) -> None:
    """Train until the last step by the group of this process; a failed one is replaced `run.max_failures` times.

    `look` is called again and again meanwhile; what it raises ends the training. Raises `TrainingFailedError`.
    """
    config, share = job.config, worker_share(job, cuda)
    arguments = worker_arguments(job, folder, cuda)
    around = Around(job, folder, share, look)
    for failures in count():
        group = group_of(config.parallel.workers, share)
        done = AllDone(folder.path / WORKER_FILE, config.train.steps)
        try:
            problem = watched(partial(group.train, arguments), around, done)
        finally:
            if not group.idle:  # failed, stopped, or a worker that never came back
                group.shutdown()
        raise_fatal(job, folder)
        if problem is None:
            return
        if failures == config.run.max_failures:
            raise TrainingFailedError(
                f"the workers failed more than run.max_failures={failures} times; the last error: "
                f"{around.cause(problem)}\nlogs: Ray's own, {ray_logs()}. The same command resumes from the newest "
                "checkpoint."
            )
        log.info(f"{around.cause(problem)}; the workers start again.")


def group_of(size: int, share: dict[str, float]) -> WarmGroup:
    """The group that this process has, if it is such a one; another is shut down, and a new one started."""
    if KEPT and (len(KEPT[0].workers), KEPT[0].share) == (size, share):
        return KEPT[0]
    if KEPT:
        KEPT[0].shutdown()
    KEPT.append(WarmGroup.start(size, share))
    return KEPT[0]


class WarmTrainWorker:
    """One worker's process."""

    def meeting(self) -> tuple[str, int]:
        """The address at which the others meet this one, for one training."""
        import ray
        import torch.distributed as dist

        address = ray.util.get_node_ip_address()
        self.store: Any = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
        return address, self.store.port

    def train(self, arguments: dict[str, Any], rank: int, size: int, meeting: tuple[str, int]) -> None:
        import torch.distributed as dist

        from finhpc.cluster.network import use_interface_of_node
        from finhpc.runs.launch_here import train_here

        use_interface_of_node()
        store = self.store if rank == 0 else dist.TCPStore(*meeting, is_master=False)  # type: ignore[attr-defined]
        train_here(arguments, rank=rank, size=size, store=store)


@dataclass
class WarmGroup:
    """`workers`: an actor for each rank, placed in `placement`. `share`: what Ray reserves for each."""

    share: dict[str, float]
    placement: Any
    workers: list[Any] = field(default_factory=list)
    idle: bool = True

    @staticmethod
    def start(size: int, share: dict[str, float]) -> WarmGroup:
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        group = WarmGroup(share, placement_group([share] * size, strategy="PACK"))
        for i in range(size):
            place = PlacementGroupSchedulingStrategy(group.placement, placement_group_bundle_index=i)
            how = {"num_cpus": share["CPU"], "num_gpus": share.get("GPU", 0), "scheduling_strategy": place}
            env = {} if "GPU" in share else {"runtime_env": {"env_vars": ENVIRONMENT}}
            group.workers.append(ray.remote(WarmTrainWorker).options(**how, **env).remote())
        return group

    def train(self, arguments: dict[str, Any]) -> None:
        """One training by all workers; raises what the first of them to fail raised."""
        import ray

        self.idle = False
        meeting = ray.get(self.workers[0].meeting.remote())
        size = len(self.workers)
        left = [worker.train.remote(arguments, rank, size, meeting) for rank, worker in enumerate(self.workers)]
        while left:
            ended, left = ray.wait(left)
            ray.get(ended)
        self.idle = True

    def shutdown(self) -> None:
        """End the workers' processes, whatever they do, and give their room back."""
        import ray
        from ray.util.placement_group import remove_placement_group

        for worker in self.workers:
            ray.kill(worker)
        remove_placement_group(self.placement)
        KEPT.clear()
