"""Check in seconds what Ray needs to start or connect; Ray itself waits for minutes, or names no cause."""

from __future__ import annotations

import os
import re
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryFile

from finhpc.cluster.package import check_workers_package
from finhpc.errors import ConfigError

ANSWER_S = 10.0  # time for a cluster to answer
SOCKET = 107  # bytes of the longest path of a Unix socket
LOG_BYTES = 64 << 20  # of a session's logs and sockets, at least


def check_ray() -> None:
    """Raise one `ConfigError` with everything that keeps Ray from starting here, or from reaching RAY_ADDRESS."""
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        return
    check_workers_package()
    address = os.environ.get("RAY_ADDRESS", "")
    if problems := list(_cluster_problems(address) if address not in ("", "local") else _machine_problems()):
        raise ConfigError(problems)


def _cluster_problems(address: str) -> Iterator[str]:
    """Yield why the cluster in RAY_ADDRESS cannot be reached."""
    if address == "auto":  # Ray looks for one on this machine and reports at once if there is none
        return
    remedy = "start the cluster, correct the address, or unset RAY_ADDRESS to work on this machine"
    match = re.fullmatch(r"(?:ray://)?\[?(.+?)\]?:(\d+)", address)
    if match is None:
        yield f"RAY_ADDRESS={address} is not an address; it is HOST:PORT: {remedy}."
        return
    try:
        socket.create_connection((match[1], int(match[2])), timeout=ANSWER_S).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        yield f"RAY_ADDRESS={address}: no cluster answers there ({reason}); {remedy}."
        return
    if os.environ.get("RAY_USE_TLS", "0") != "1" and not _speaks_grpc(f"{match[1]}:{match[2]}"):
        yield f"RAY_ADDRESS={address}: what answers there is not a Ray cluster; {remedy}."


def _speaks_grpc(target: str) -> bool:
    import grpc  # type: ignore[import-untyped]

    with grpc.insecure_channel(target) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=ANSWER_S)
        except grpc.FutureTimeoutError:
            return False
    return True


def _machine_problems() -> Iterator[str]:
    """Yield why Ray cannot start on this machine."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() == "token" and not _has_token():
        folder = Path.home() / ".ray"
        if reason := _not_writable(folder):
            yield (
                f"HOME={Path.home()} is not writable ({reason}), and Ray keeps the token there that protects it; set "
                "HOME to a folder of yours, or RAY_AUTH_TOKEN to a secret text."
            )
    variable, folder = session_base()
    remedy = "set RAY_TMPDIR to a short path of a folder of yours on a local disk"
    if (length := _socket_bytes(folder)) > SOCKET:
        yield (
            f"{variable}={folder} is too long for Ray's sockets ({length} of {SOCKET} bytes with what Ray adds); "
            f"{remedy}."
        )
    if reason := _not_writable(folder):
        yield f"{variable}={folder} cannot be written ({reason}), and Ray keeps its logs and sockets there; {remedy}."
    elif (free := shutil.disk_usage(_existing(folder)).free) < LOG_BYTES:
        yield f"{variable}={folder} has {free / 1e6:.0f} MB left, too little for Ray's logs; make room, or {remedy}."


def session_base() -> tuple[str, Path]:
    """Return the folder for Ray's, and the variable that sets it: RAY_TMPDIR, TMPDIR if short enough, else /tmp."""
    if ray := os.environ.get("RAY_TMPDIR"):
        return "RAY_TMPDIR", Path(ray).absolute()
    general = Path(os.environ.get("TMPDIR") or "/tmp").absolute()
    return ("TMPDIR", general) if _socket_bytes(general) <= SOCKET else ("RAY_TMPDIR", Path("/tmp"))


def _socket_bytes(folder: Path) -> int:
    """Return the length of the path of one of Ray's sockets, in a folder of its own below `folder`."""
    session = f"/ray-12345678/session_2026-01-01_00-00-00_000000_{os.getpid()}/sockets/plasma_store"
    return len(os.fsencode(str(folder))) + len(session)


def _has_token() -> bool:
    if os.environ.get("RAY_AUTH_TOKEN"):
        return True
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        return path.is_file() and bool(path.read_bytes().strip())
    except OSError:
        return False


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())


def _not_writable(folder: Path) -> str | None:
    """Return why a folder, or the nearest existing one above it, is not writable; None if it is."""
    try:
        TemporaryFile(dir=_existing(folder)).close()
    except OSError as error:
        return error.strerror or str(error)
    return None
