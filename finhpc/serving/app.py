"""The server as an application of Ray Serve: each replica opens the model and runs its own batcher.

`finhpc serve` deploys it on one machine, where a single replica listens itself and several have Serve's proxy. On a
cluster, a Serve config file names `finhpc.serving.app:build` as `import_path` and gives settings of `finhpc serve` as
`args`; its pods have the token in FINHPC_SERVE_TOKEN.
"""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.schema import LoggingConfig

from finhpc.cluster.package import Driver
from finhpc.errors import CheckpointError, ConfigError
from finhpc.models.files.manifest import weights_fingerprint
from finhpc.models.files.source import locate
from finhpc.serving.opening import open_served
from finhpc.serving.plan import check, listed, resolved
from finhpc.serving.shared import Shared
from finhpc.serving.token import read_token
from finhpc.serving.web import make_app
from finhpc.settings.base import load
from finhpc.settings.serve import ServeConfig
from finhpc.training.allocator import ENVIRONMENT

log = logging.getLogger(__name__)

NAME = "finhpc"
SPARE = 64  # requests of a replica beyond those in its queue: probes, metrics, those that are refused
TRIES = 3  # of a replica's start, if the first replica does not start either
# Of a replica on a CPU. Threads with arenas of their own would each keep the largest pass they ever computed. Between
# two operations of a pass lie up to 0.1 ms of Python, in which a thread of OpenMP that sleeps must be woken up again.
PROCESS = ENVIRONMENT | {"GOMP_SPINCOUNT": "20000"}


@dataclass(frozen=True)
class Plan:
    """What every replica gets. `token_sha256`: None if each reads the token of its own environment.

    `listens`: it answers on the settings' host and port itself.
    """

    settings: dict[str, Any]
    fingerprint: str
    driver: Driver
    token_sha256: str | None
    listens: bool

    @classmethod
    def of(cls, config: ServeConfig, token: str | None, listens: bool) -> Plan:
        """The plan of a checked config, whose `state` is set."""
        digest = None if token is None else hashlib.sha256(token.encode()).hexdigest()
        fingerprint = weights_fingerprint(locate(config.model))
        return cls(config.model_dump(), fingerprint, Driver.here(), digest, listens)


@serve.deployment(name=NAME)
@serve.ingress()
class Replica:
    """One copy of the model."""

    def __init__(self, plan: Plan) -> None:
        logging.getLogger("finhpc").setLevel(logging.INFO)
        plan.driver.enter()
        config = load(ServeConfig, None, plan.settings)
        path = locate(config.model)
        if (found := weights_fingerprint(path)) != plan.fingerprint:
            raise CheckpointError(
                f"model={path} changed since the server started (sha256 {found[:12]} instead of "
                f"{plan.fingerprint[:12]}), and one server has one version; restore it, or start the server again."
            )
        self.served, self.metrics = open_served(config, serve.get_replica_context().replica_id.unique_id)
        self.token_sha256 = plan.token_sha256 or hashlib.sha256(read_token(config).encode()).hexdigest()
        self.address = (config.host, config.port) if plan.listens else None

    async def __serve_build_asgi_app__(self) -> Any:
        return make_app(self.served, self.metrics, self.token_sha256, self.address)

    def check_health(self) -> None:
        """Raise if the model stopped working, so that Serve starts another replica."""
        if (failure := self.served.engine.failure) is not None:
            raise RuntimeError(failure)


def application(config: ServeConfig, plan: Plan, gpus: bool) -> Application:
    """Return the application, with `config.replicas` replicas."""
    limits, resources = config.limits, config.resources
    deployment = Replica.options(  # type: ignore[attr-defined]  # the decorator makes a Deployment of the class
        num_replicas=config.replicas,
        ray_actor_options={
            "num_cpus": resources.cpus_per_worker,
            "num_gpus": resources.gpus_per_worker if gpus else 0,
            "runtime_env": {"env_vars": {} if gpus else PROCESS | _cores(config, plan)},
        },
        # Serve's own queue is never the one that fills up, so that a refused request gets OpenAI's error.
        max_ongoing_requests=limits.max_running + limits.max_queue + SPARE,
        graceful_shutdown_timeout_s=config.drain_s + 5,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=5,
        health_check_timeout_s=60,
        max_constructor_retry_count=TRIES,
        logging_config=LoggingConfig(enable_access_log=False, log_level="WARNING"),
    )
    return deployment.bind(plan)


def _cores(config: ServeConfig, plan: Plan) -> dict[str, str]:
    """Return the variable that gives each OpenMP thread a core, if the one replica here has as many as there are cores.

    Threads that wake each other up for every operation otherwise take turns on one core and leave another idle: 60 us
    instead of 28 for a product of one row, 576 x 576 in bfloat16, on two cores.
    """
    cores = sorted(os.sched_getaffinity(0))
    if not plan.listens or config.resources.threads < len(cores):
        return {}
    return {"GOMP_CPU_AFFINITY": " ".join(map(str, cores))}


def build(args: dict[str, Any]) -> Application:
    """Return the application for `serve deploy`; `args`: settings of `finhpc serve`, except host and port.

    Raises `ConfigError` for settings and adapters that cannot work.
    """
    config = resolved(load(ServeConfig, None, args))
    if config.state is None:
        raise ConfigError("state is not set; give a folder that all replicas see, such as /shared/serve.")
    check(config)
    Shared(Path(config.state)).create(listed(config))
    return application(config, Plan.of(config, None, listens=False), gpus=config.resources.device == "cuda")
