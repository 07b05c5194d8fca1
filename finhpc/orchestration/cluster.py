"""The Ray cluster a command works on: the one it is submitted to, or one of its own on this machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from finhpc.config import TrainingConfig
from finhpc.errors import ConfigError, TrainingFailedError
from finhpc.ray_ready import check_ray, session_logs


@contextmanager
def ray_cluster() -> Iterator[None]:
    """Connect to the cluster in RAY_ADDRESS (set in submitted jobs), or start one here and stop it after."""
    import ray

    if ray.is_initialized():
        yield
        return
    check_ray()
    # What polls and waits by default costs a short run seconds.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    _keep_token_private()  # an older one, before anything listens
    try:
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
    except Exception as error:  # Ray raises bare ones here
        where = os.environ.get("RAY_ADDRESS") or "this machine"
        raise TrainingFailedError(
            f"Ray did not start on {where}: {str(error).rstrip('.')}. Its logs are in {session_logs()}; correct that "
            "and run the same command again."
        ) from None
    try:
        yield
    finally:
        _shut_down()


def _shut_down() -> None:
    """Leave Ray; of one started here, leave no process behind.

    It ends its workers by asking them, and one that was stopped never hears it.
    """
    import psutil
    import ray
    from ray._private import worker

    node = getattr(worker, "_global_node", None)
    raylets = node.all_processes.get("raylet", []) if node is not None else []
    workers: list[psutil.Process] = []
    for raylet in raylets:
        with suppress(psutil.Error):
            workers += psutil.Process(raylet.process.pid).children(recursive=True)
    ray.shutdown()
    _, left = psutil.wait_procs(workers, timeout=5)
    for process in left:
        with suppress(psutil.Error):
            process.kill()


def cluster_resources() -> dict[str, float]:
    """What the connected cluster has in all: CPU, GPU, ..."""
    import ray

    return dict(ray.cluster_resources())


def known_resources() -> dict[str, float] | None:
    """The same without connecting: this machine's, or None when RAY_ADDRESS names another cluster."""
    import torch

    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        return cluster_resources()
    if os.environ.get("RAY_ADDRESS"):
        return None
    return {"CPU": os.cpu_count() or 1, "GPU": torch.cuda.device_count()}


def use_cuda(config: TrainingConfig, total: dict[str, float]) -> bool:
    """Whether the workers run on GPUs; raises `ConfigError` when asked for and absent."""
    gpus = total.get("GPU", 0)
    if config.resources.device == "cuda" and not gpus:
        raise ConfigError(
            "resources.device=cuda, but the cluster has no GPU; use --resources.device cpu, or a cluster with GPUs."
        )
    return config.resources.device == "cuda" or (config.resources.device == "auto" and gpus > 0)


def check_fits(config: TrainingConfig, cuda: bool, total: dict[str, float]) -> None:
    """Raise `ConfigError` when the cluster could never place the workers (Ray would wait for ever)."""
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


def dead_process() -> str | None:
    """The name of a process of this machine's own Ray that died under us; None while all is well.

    Ray itself notices after a minute or never, and then ends this process without a word of ours.
    """
    from ray._private import worker

    node = getattr(worker, "_global_node", None)
    dead = node.dead_processes() if node is not None else []
    return next((str(name) for name, _ in dead if name in ("raylet", "gcs_server")), None)


def _keep_token_private() -> None:
    """Ray writes its authentication token readable by everyone; make it the user's alone."""
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    with suppress(PermissionError):  # a token that somebody else put there is not ours to change
        if token.is_file() and token.stat().st_mode & 0o077:
            token.chmod(0o600)
