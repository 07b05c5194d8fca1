"""A Ray of this command's own, on this machine: readable by its user alone, and gone afterwards."""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from finhpc.cluster.ready import session_base
from finhpc.errors import TrainingFailedError
from finhpc.interrupts import removed_at_once, terminable

log = logging.getLogger(__name__)

# Threads of OpenMP that wait for the others of their operation check this often, some microseconds, before they sleep.
# GNU's default takes milliseconds of a core that a busy process of another program, and so the others, could use; not
# to check at all (OMP_WAIT_POLICY=passive) made a training step 3 to 9 % slower.
WAITING = {"GOMP_SPINCOUNT": "1000"}
# Ray starts workers at niceness 15, so that a busy process on one of two cores leaves a worker's thread there 3 % of
# it, for which the other thread waits.
NICENESS = {"RAY_worker_niceness": "0"}
# Each process of Ray wakes a hundred times a second and takes up to 1 % of a core, for which all threads of a training
# step wait. This machine is not announced to be preempted, and nobody reads the statistics of Ray's agent here.
IDLE = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0", "REPORTER_UPDATE_INTERVAL_MS": "60000"}
KEEP = "keep"  # in Ray's folder: a message names the logs in it
LOGS = "session_latest/logs"  # in Ray's folder


@contextmanager
def own_ray(cpus: int) -> Iterator[None]:
    """Start Ray here with `cpus` CPUs, and stop it after the block.

    Its folder (logs, sockets, spilled objects) is below `session_base` and is removed afterwards, unless Ray did not
    start or `ray_logs` named it. A start that takes too long is tried once more. Raises `TrainingFailedError` if Ray
    does not start.
    """
    # Workers inherit them; Ray Train's own 2 s cost a short run seconds.
    for name, value in {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5", **WAITING, **NICENESS, **IDLE}.items():
        os.environ.setdefault(name, value)
    keep_token_private()  # an older one, before anything listens
    with ExitStack() as stack:
        try:
            _start(cpus, stack)
        except TimeoutError as error:
            log.warning(f"{error}; trying once more.")
            try:
                _start(cpus, stack)
            except TimeoutError as again:
                raise TrainingFailedError(f"{again}; {_how_to_start()}") from None
        keep_token_private()
        with terminable():  # again, because Ray replaces the handlers
            yield


def _start(cpus: int, stack: ExitStack) -> None:
    """Start Ray in a new folder; leaving `stack` ends both. Raises `TimeoutError` if the start takes too long."""
    import ray
    from ray._private import auto_init_hook

    # A thread of Ray Tune that still waits when a stopped sweep has left Ray would start another one.
    auto_init_hook.enable_auto_connect = False
    base = session_base()[1]
    base.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir=base))  # mode 0700
    stack.enter_context(removed_at_once(str(folder)))
    stack.callback(_remove_unless_named, folder)
    stack.callback(_shut_down)
    try:
        ray.init(
            "local",
            num_cpus=cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            _temp_dir=str(folder),
        )
    except Exception as error:  # Ray raises bare ones here
        (folder / KEEP).touch()
        _shut_down()
        problem = f"Ray did not start on this machine: {str(error).rstrip('.')}. Its logs are in {folder / LOGS}"
        if re.search(r"timed? ?out", str(error), re.IGNORECASE):
            raise TimeoutError(problem) from None
        raise TrainingFailedError(f"{problem}; fix this and rerun the command.") from None


def _how_to_start() -> str:
    """What to do if Ray does not start in time."""
    import psutil

    variable, base = session_base()
    return (
        f"the machine is probably busy or short of memory (load {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores, "
        f"{psutil.virtual_memory().available / 1e9:.1f} GB available): wait, or end other work, such as Ray processes "
        f"that an earlier command left (`pgrep -fl raylet` lists them). If {variable}={base} is on a network disk, set "
        "RAY_TMPDIR to a short path on a local one. Then rerun the command."
    )


def _remove_unless_named(folder: Path) -> None:
    if not (folder / KEEP).exists():
        shutil.rmtree(folder, ignore_errors=True)


def ray_node() -> Any:
    """Return what Ray knows of this process's node and the processes it started, or None; private to Ray."""
    from ray._private import worker

    return getattr(worker, "_global_node", None)


def ray_logs() -> str:
    """Return the folder of Ray's logs, for a message; it remains when Ray has ended."""
    if (node := ray_node()) is None:
        return f"{LOGS} in Ray's folder"
    logs = Path(node.get_logs_dir_path())
    with suppress(OSError):
        (logs.parent.parent / KEEP).touch()
    return str(logs)


def keep_token_private() -> None:
    """Make Ray's authentication token, which Ray writes readable by everyone, readable by the user alone."""
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    with suppress(PermissionError):  # another user's token cannot be changed
        if token.is_file() and token.stat().st_mode & 0o077:
            token.chmod(0o600)


def _shut_down() -> None:
    """Stop Ray and kill the workers that do not end, such as suspended ones."""
    import psutil
    import ray

    node = ray_node()
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
