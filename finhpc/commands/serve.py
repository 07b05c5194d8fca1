"""`finhpc serve`: a model and its adapters behind OpenAI's API, until it is stopped."""

from __future__ import annotations

import ipaddress
import logging
import os
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from finhpc.cluster.connect import cluster_resources, dead_process, ray_cluster, room_in, use_cuda
from finhpc.cluster.watched import POLL_S, check_ray, watch
from finhpc.errors import ConfigError, FinhpcError, TrainingFailedError
from finhpc.files import private_folder
from finhpc.interrupts import Terminated, removed_at_once
from finhpc.screen import counted, duration, summary_table
from finhpc.serving import metrics, plan
from finhpc.serving.plan import Memory
from finhpc.serving.served import model_name
from finhpc.serving.shared import Shared
from finhpc.serving.token import VARIABLE, given_token
from finhpc.settings.serve import ServeConfig

log = logging.getLogger(__name__)

LINE_EVERY_S = 10.0
STATUS_EVERY_S = 5.0
SETTLE_S = 1.5  # until all replicas have noticed, and counted what they had accepted before
FLUSH_S = 0.3  # for the last bytes of answers to leave the proxy
END_S = 30.0  # for Serve to end
START_AGAIN = "; start the server again."


def serve(config: ServeConfig, dry_run: bool = False) -> dict[str, Any]:
    """Serve a model until Ctrl-C or SIGTERM, after which running requests have `drain_s` to finish.

    Prints how to call it, and its token if none was given. With `dry_run` everything is checked and memory is counted.
    Raises `ConfigError` for settings, adapters, a token or a port that cannot be used, `CheckpointError` for damaged
    weights.
    """
    begin, model = time.monotonic(), config.model
    config = plan.resolved(config)
    inputs = plan.check(config)
    memory = plan.memory_of(config, inputs)
    token = given_token(config)
    _check_port(config)
    result = {
        "status": "dry_run",
        "model": model,
        "name": model_name(config),
        "adapters": list(inputs.adapters),
        "url": f"http://{_called(config.host)}:{config.port}/v1",
        "model_bytes": memory.weights,
        "cache_bytes": memory.cache,
        "cache_blocks": memory.blocks,
        "cache_tokens": memory.tokens,
    }
    if dry_run:
        _show("dry run: nothing was started", config, memory, result)
        return result
    printed = token is None
    token = token or secrets.token_urlsafe(24)
    with ExitStack() as stack:
        shared = Shared(stack.enter_context(_state(config)))
        config = config.model_copy(update={"state": str(shared.folder)})
        shared.create(plan.listed(config))
        stack.enter_context(ray_cluster())
        with _deployed(config, token):
            _show(f"serving {model_name(config)}", config, memory, result)
            _show_call(config, token if printed else None, result)
            counts = _watch(config, shared)
    return {**result, "status": "finished", **counts, "wall_s": time.monotonic() - begin}


@contextmanager
def _state(config: ServeConfig) -> Iterator[Path]:
    """Yield the folder that replicas share, a temporary one by default."""
    if config.state is not None:
        private_folder(Path(config.state))
        yield Path(config.state)
    else:
        with tempfile.TemporaryDirectory(prefix="finhpc-serve-") as folder, removed_at_once(folder):
            yield Path(folder)


@contextmanager
def _deployed(config: ServeConfig, token: str) -> Iterator[None]:
    """Start the replicas, and Serve's proxy if there are several, and end them after the block."""
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
    from ray import serve as ray_serve

    from finhpc.serving.app import NAME, Plan, application

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    total = cluster_resources()
    gpus = use_cuda(config.resources, total)
    if (room := room_in(total, config.resources, gpus)) < config.replicas:
        raise ConfigError(
            f"replicas={config.replicas} with resources.cpus_per_worker={config.resources.cpus_per_worker:g} do not "
            f"fit, there is room for {room}; use fewer replicas, or fewer CPUs for each."
        )
    if os.environ.get("RAY_ADDRESS") and _runs():
        raise ConfigError(
            "Ray Serve runs on this cluster already, with a proxy of its own; deploy there with `serve deploy` and "
            "finhpc.serving.app:build, or use another cluster."
        )
    log.info(f"opening the model in {counted(config.replicas, 'replica')}")
    alone = config.replicas == 1 and "RAY_ADDRESS" not in os.environ  # and thus on this machine

    def start() -> None:
        ray_serve.start(
            proxy_location="Disabled" if alone else "HeadOnly",
            http_options={"host": config.host, "port": config.port},
            logging_config={"enable_access_log": False, "log_level": "WARNING"},
        )
        ray_serve.run(application(config, Plan.of(config, token, alone), gpus), name=NAME)

    try:
        if error := watch(start, lambda: None, START_AGAIN):
            if isinstance(error, FinhpcError):
                raise error
            raise TrainingFailedError(f"the server did not start: {_cause(error, _status())}") from None
        yield
    finally:
        if dead_process() is None:
            deadline = time.monotonic() + END_S
            watch(ray_serve.shutdown, lambda: time.monotonic() > deadline, START_AGAIN)


def _runs() -> bool:
    """Return whether Serve runs on the connected cluster."""
    from ray.serve.context import _get_global_client

    return _get_global_client(raise_if_no_controller_running=False) is not None


def _status() -> str:
    """Return what Serve says of replicas that are not healthy; empty if all are."""
    from ray import serve as ray_serve

    try:
        applications = ray_serve.status().applications.values()
    except Exception:  # Ray raises many kinds of errors while Serve's controller starts again
        return "Serve's controller does not answer."
    messages = [
        each.message or application.message
        for application in applications
        for each in application.deployments.values()
        if str(each.status) not in ("HEALTHY", "DeploymentStatus.HEALTHY")
    ]
    return "\n".join(messages)


def _cause(error: Exception, status: str) -> str:
    """Return the last line that names an error of ours, or the last line."""
    lines = [line.strip() for line in f"{error}\n{status}".splitlines() if line.strip()]
    own = [line.partition("Error: ")[2] for line in lines if line.startswith("finhpc.errors.")]
    return (own or lines or ["unknown"])[-1]


def _check_port(config: ServeConfig) -> None:
    """Raise `ConfigError` if the address cannot be listened on; log a warning if it is open to others."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"host={config.host} port={config.port} cannot be used ({reason}); choose another, such as "
                f"--port {config.port % 65535 + 1}, or end the program that listens there."
            ) from None
    if not _is_local(config.host):
        log.warning(
            f"host={config.host} is open to other machines, without encryption: token and texts can be read on the "
            "way. Put a proxy with TLS before it, or leave --host out."
        )


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _called(host: str) -> str:
    """Return the address by which this machine calls the server."""
    address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{address}]" if ":" in address else address


def _show(title: str, config: ServeConfig, memory: Memory, result: dict[str, Any]) -> None:
    names = [f"{result['name']}:{name}" for name in result["adapters"]]
    rows = [
        ("URL", result["url"]),
        ("model", result["name"]),
        ("adapters", ", ".join(names) or "none"),
        ("weights", f"{memory.weights / 1e6:,.1f} MB"),
        (
            "cache",
            f"{memory.cache / 1e6:,.1f} MB: {memory.blocks:,} blocks of {config.cache.block_size} tokens, "
            f"{memory.tokens:,} tokens",
        ),
        ("replicas", f"{config.replicas}, each with {counted(config.limits.max_running, 'request')} at once"),
    ]
    summary_table(title, rows)


def _show_call(config: ServeConfig, token: str | None, result: dict[str, Any]) -> None:
    """Print how to call the server, and a token that was made for it."""
    if token is not None:
        log.info(f"The token is shown only now:\nexport {VARIABLE}={token}")
    call = f'{{"model": "{result["name"]}", "prompt": "The bank", "max_tokens": 32}}'
    where = (
        f'-H "Authorization: Bearer ${VARIABLE}"'
        if config.token_file is None
        else (f'-H "Authorization: Bearer $(cat {config.token_file})"')
    )
    log.info(f"curl {result['url']}/completions {where} -H 'Content-Type: application/json' -d '{call}'")
    log.info("Press Ctrl-C to end it.")


def _watch(config: ServeConfig, shared: Shared) -> dict[str, Any]:
    """Show what the server does until it is stopped; then let running requests finish. Returns the counts."""
    stop = threading.Event()
    follower = threading.Thread(target=_follow, args=(shared, stop), daemon=True, name="finhpc-serve-lines")
    follower.start()
    try:
        while True:
            time.sleep(POLL_S)
            check_ray(START_AGAIN)
    except (KeyboardInterrupt, Terminated):
        _drain(config, shared)
    finally:
        stop.set()
    follower.join(timeout=POLL_S + 1)
    sums = metrics.totals(shared)
    return {"requests": int(sums.get(metrics.REQUESTS, 0)), "new_tokens": int(sums.get(metrics.NEW_TOKENS, 0))}


def _drain(config: ServeConfig, shared: Shared) -> None:
    """Refuse new requests, and wait until the running ones have ended or the time is over."""
    shared.drain()
    begin = time.monotonic()
    log.info(f"no new requests are accepted; running ones have {duration(config.drain_s)} to finish")
    time.sleep(SETTLE_S)
    while left := int(metrics.totals(shared).get(metrics.IN_FLIGHT, 0)):
        if time.monotonic() - begin > config.drain_s:
            log.warning(f"{counted(left, 'request')} did not finish within drain_s={config.drain_s:g} and end now.")
            return
        time.sleep(POLL_S)
    time.sleep(FLUSH_S)
    log.info(f"all requests have finished, after {duration(time.monotonic() - begin)}")


def _follow(shared: Shared, stop: threading.Event) -> None:
    """Print a line when something was done, and one when replicas are not well, at most every few seconds."""
    shown: tuple[float, float, float] = (0.0, 0.0, time.monotonic())
    problem, looked = "", time.monotonic()
    while not stop.wait(1.0):
        now = time.monotonic()
        if now - looked >= STATUS_EVERY_S:
            looked = now
            if (status := _status()) != problem and not stop.is_set():
                problem = status
                if status:
                    log.warning(f"a replica is not well: {_cause(Exception(), status)}")
                else:
                    log.info("all replicas are well again")
        sums = metrics.totals(shared)
        requests, tokens = sums.get(metrics.REQUESTS, 0), sums.get(metrics.NEW_TOKENS, 0)
        if now - shown[2] >= LINE_EVERY_S and (requests, tokens) != shown[:2]:
            rate = max(0.0, tokens - shown[1]) / (now - shown[2])
            used = sums.get(metrics.BLOCKS_USED, 0) / max(sums.get(metrics.BLOCKS, 0), 1)
            log.info(
                f"{requests:,.0f} requests answered, {sums.get(metrics.RUNNING, 0):.0f} running, "
                f"{sums.get(metrics.WAITING, 0):.0f} waiting, {rate:,.1f} tokens/s, cache {used:.0%} in use"
            )
            shown = requests, tokens, now
        elif now - shown[2] >= LINE_EVERY_S:
            shown = requests, tokens, now
