"""The Ray cluster a command works on: the one it is submitted to, or one of its own on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finhpc.config import PretrainConfig
from finhpc.errors import ConfigError


@contextmanager
def ray_cluster() -> Iterator[None]:
    """Connect to the cluster in RAY_ADDRESS (set in submitted jobs), or start one here and stop it after."""
    import ray

    if ray.is_initialized():
        yield
        return
    # What polls and waits by default costs a short run seconds.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False, logging_level="ERROR")
    else:
        ray.init(
            "local",
            num_cpus=os.cpu_count() or 1,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
        _keep_token_private()
    try:
        yield
    finally:
        ray.shutdown()


def use_cuda(config: PretrainConfig) -> bool:
    """Whether the workers run on GPUs; raises `ConfigError` when asked for and absent."""
    import ray

    gpus = ray.cluster_resources().get("GPU", 0)
    if config.resources.device == "cuda" and not gpus:
        raise ConfigError("resources.device=cuda, but the cluster has no GPU; use cpu, or a cluster with GPUs.")
    return config.resources.device == "cuda" or (config.resources.device == "auto" and gpus > 0)


def check_fits(config: PretrainConfig, cuda: bool) -> None:
    """Raise `ConfigError` when the cluster could never place the workers (Ray would wait for ever)."""
    import ray

    total = ray.cluster_resources()
    own = not os.environ.get("RAY_ADDRESS")
    workers, resources = config.parallel.workers, config.resources
    problems = []
    cpus = total.get("CPU", 0)  # reading data reserves none, see `data.stream`
    if workers * resources.cpus_per_worker > cpus:
        where = "this machine has" if own else "the cluster has"
        problems.append(
            f"parallel.stages x parallel.replicas = {workers} workers of resources.cpus_per_worker="
            f"{resources.cpus_per_worker:g} need {workers * resources.cpus_per_worker:g} CPUs; {where} {cpus:g}; "
            f"use fewer, or resources.cpus_per_worker={cpus / workers:.3g} to share cores."
        )
    if cuda and workers * resources.gpus_per_worker > total.get("GPU", 0):
        problems.append(
            f"{workers} workers of resources.gpus_per_worker={resources.gpus_per_worker:g} need "
            f"{workers * resources.gpus_per_worker:g} GPUs; the cluster has {total.get('GPU', 0):g}; use fewer."
        )
    if problems:
        raise ConfigError(problems)


def _keep_token_private() -> None:
    """Ray writes its authentication token readable by everyone; make it the user's alone."""
    token = Path.home() / ".ray" / "auth_token"
    if token.is_file():
        token.chmod(0o600)
