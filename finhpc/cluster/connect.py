"""The Ray cluster of a command: the one it is submitted to, or one of its own on this machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from finhpc.cluster.own_ray import keep_token_private, own_ray, ray_node
from finhpc.cluster.ready import check_ray
from finhpc.errors import ConfigError, TrainingFailedError
from finhpc.interrupts import terminable
from finhpc.settings.training import Resources, TrainingConfig


@contextmanager
def ray_cluster(cpus: int | None = None) -> Iterator[None]:
    """Connect to the cluster in RAY_ADDRESS (set in submitted jobs), or start one here and stop it after the block.

    `cpus`: how many a cluster started here offers; default: all of this machine's.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    check_ray()
    address = os.environ.get("RAY_ADDRESS")
    with _given_cluster(address) if address else own_ray(cpus or os.cpu_count() or 1):
        yield


@contextmanager
def _given_cluster(address: str) -> Iterator[None]:
    import ray

    keep_token_private()
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    try:
        try:
            ray.init(log_to_driver=False, logging_level="ERROR")
        except Exception as error:  # Ray raises bare ones here
            raise TrainingFailedError(
                f"the Ray cluster at RAY_ADDRESS={address} cannot be used: {str(error).rstrip('.')}; check with "
                "`ray status` that it runs, or unset RAY_ADDRESS to work on this machine, then rerun the command."
            ) from None
        with terminable():  # again, because Ray replaces the handlers
            yield
    finally:
        ray.shutdown()


def cluster_resources() -> dict[str, float]:
    """Return what the connected cluster has in total: CPU, GPU, ..."""
    import ray

    return dict(ray.cluster_resources())


def known_resources() -> dict[str, float] | None:
    """Return the same without connecting: this machine's, or None if RAY_ADDRESS names another cluster."""
    import torch

    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        return cluster_resources()
    if os.environ.get("RAY_ADDRESS"):
        return None
    return {"CPU": os.cpu_count() or 1, "GPU": torch.cuda.device_count()}


def use_cuda(resources: Resources, total: dict[str, float]) -> bool:
    """Return whether workers run on GPUs. Raises `ConfigError` if the settings require GPUs and there are none."""
    gpus = total.get("GPU", 0)
    if resources.device == "cuda" and not gpus:
        raise ConfigError(
            "resources.device=cuda, but the cluster has no GPU; use --resources.device cpu, or a cluster with GPUs."
        )
    return resources.device == "cuda" or (resources.device == "auto" and gpus > 0)


def places(resources: Resources, cuda: bool, workers: int = 0) -> int:
    """Return how many workers the cluster has room for. Raises `ConfigError` if it has less than `workers`, or none."""
    total = cluster_resources()
    room = total.get("CPU", 1) / resources.cpus_per_worker
    room = int(min(room, total.get("GPU", 0) / resources.gpus_per_worker) if cuda else room)
    if room < max(workers, 1):
        raise ConfigError(
            f"workers={workers or 1} with resources.cpus_per_worker={resources.cpus_per_worker:g} do not fit the "
            f"cluster, which has room for {room}; use fewer workers, or fewer CPUs per worker."
        )
    return room


def check_fits(config: TrainingConfig, cuda: bool, total: dict[str, float]) -> None:
    """Raise `ConfigError` if the cluster can never place the workers; Ray would wait forever."""
    own = not os.environ.get("RAY_ADDRESS")
    workers, resources = config.parallel.workers, config.resources
    problems = []
    cpus = total.get("CPU", 0)  # reading data reserves none, see `data.shards.stream`
    if workers * resources.cpus_per_worker > cpus:
        where = "this machine has" if own else "the cluster has"
        problems.append(
            f"parallel.stages x parallel.replicas = {workers} workers of resources.cpus_per_worker="
            f"{resources.cpus_per_worker:g} need {workers * resources.cpus_per_worker:g} CPUs; {where} {cpus:g}; "
            f"use fewer, or resources.cpus_per_worker={cpus / workers:.3g} to share cores."
        )
    if cuda and workers > 1 and resources.gpus_per_worker % 1:
        problems.append(
            f"resources.gpus_per_worker={resources.gpus_per_worker:g} with {workers} workers would put two workers "
            "of a run on one GPU, which NCCL refuses; use resources.gpus_per_worker=1, or one worker "
            "(parallel.stages=1 and parallel.replicas=1), of which several runs may share a GPU."
        )
    if cuda and workers * resources.gpus_per_worker > total.get("GPU", 0):
        problems.append(
            f"{workers} workers of resources.gpus_per_worker={resources.gpus_per_worker:g} need "
            f"{workers * resources.gpus_per_worker:g} GPUs; the cluster has {total.get('GPU', 0):g}; use fewer."
        )
    if problems:
        raise ConfigError(problems)


def dead_process() -> str | None:
    """Return the name of a process of this machine's own Ray that died, or None.

    Ray itself notices after a minute or never, and then ends this process without an explanation.
    """
    node = ray_node()
    dead = node.dead_processes() if node is not None else []
    return next((str(name) for name, _ in dead if name in ("raylet", "gcs_server")), None)
