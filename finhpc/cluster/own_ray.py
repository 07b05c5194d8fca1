"""A Ray of this command's own, on this machine: readable by its user alone, and gone afterwards."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from finhpc.cluster.ready import session_base
from finhpc.interrupts import removed_at_once, terminable

KEEP = "keep"  # in Ray's folder: a message names the logs in it


@contextmanager
def own_ray(cpus: int) -> Iterator[None]:
    """Start Ray here with `cpus` CPUs, and stop it after the block.

    Its folder (logs, sockets, spilled objects) is below `session_base` and is removed afterwards, unless Ray did not
    start or `ray_logs` named it.
    """
    import ray

    # Workers inherit it; Ray Train's own 2 s cost a short run seconds.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    base = session_base()[1]
    base.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir=base))  # mode 0700
    keep_token_private()  # an older one, before anything listens
    with removed_at_once(str(folder)):
        try:
            try:
                ray.init(
                    "local",
                    num_cpus=cpus,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level="ERROR",
                    _temp_dir=str(folder),
                )
            except Exception:
                (folder / KEEP).touch()
                raise
            keep_token_private()
            with terminable():  # again, because Ray replaces the handlers
                yield
        finally:
            _shut_down()
            if not (folder / KEEP).exists():
                shutil.rmtree(folder, ignore_errors=True)


def ray_logs() -> str:
    """Return the folder of Ray's logs, for a message; it remains when Ray has ended."""
    from ray._private import worker

    node = getattr(worker, "_global_node", None)
    if node is None:
        return "session_latest/logs in Ray's folder"
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
