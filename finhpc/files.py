"""Files and folders that are complete or absent, even after a power cut, and that only their user can read."""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import json
import math
import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finhpc.errors import ConfigError, DataError, RunBusyError

MASK = "FINHPC_UMASK"


def _mask() -> int:
    text = os.environ.get(MASK, "077")
    try:
        mask = int(text, 8)
        if not 0 <= mask <= 0o777:
            raise ValueError
    except ValueError:
        raise ConfigError(f"{MASK}={text} is not an octal number from 0 to 777; use 077, or 027 to share.") from None
    return mask


@contextmanager
def private_files() -> Iterator[None]:
    """Make files written in the block readable by their user alone: shards, examples and models contain private text.

    FINHPC_UMASK, an octal number such as 027, shares them. Raises `ConfigError` for any other value.
    """
    before = os.umask(_mask())
    try:
        yield
    finally:
        os.umask(before)


def private_folder(path: Path) -> None:
    """Create a folder that only its user can read, unless FINHPC_UMASK says otherwise, if it does not exist."""
    path.mkdir(parents=True, exist_ok=True, mode=0o777 & ~_mask())


@contextmanager
def partial_file(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file; it replaces `path` at the end of the block and is removed on an error."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        _sync(partial)
        os.replace(partial, path)
        _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file so that a crash at any moment leaves either the old content or the new one."""
    with partial_file(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: Any, indent: int = 1) -> None:
    """Write a JSON file atomically, as `strict_json` formats it."""
    write_atomic(path, strict_json(value, indent) + "\n")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with the same keys as a CSV file, atomically; None becomes an empty field."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue())


def strict_json(value: Any, indent: int | None = None) -> str:
    """Return JSON that every reader accepts: NaN and infinite floats become strings."""
    return json.dumps(_finite(value), allow_nan=False, ensure_ascii=False, indent=indent)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def publish(partial: Path, folder: Path, over: bool = False) -> None:
    """Sync a finished folder and move it to its place.

    With `over` it replaces an existing folder, which is removed once the new one is on disk. Raises `OSError` if
    something is in the way and `over` is off.
    """
    for path in [*partial.rglob("*"), partial]:
        _sync(path)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if over and folder.exists():
        folder.rename(old)
    partial.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def lock(path: Path, name: str, remedy: str) -> Iterator[None]:
    """Lock a file for this process until the block ends or the process dies, however it dies.

    `name`: the locked setting as the user gave it, such as "out=/data/shards"; `remedy`: what to do instead of
    waiting. Raises `RunBusyError` naming the process that holds the lock, and `ConfigError` if the disk has no locks.
    """
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise RunBusyError(f"{name} is busy: {holder} is using it; wait until that ends, or {remedy}.") from None
        except OSError as error:
            raise ConfigError(
                f"{name}: the disk of {path.parent} does not support file locks ({error.strerror}), which keep two "
                "commands from using one folder; use another disk, or mount it with locks (flock)."
            ) from None
        file.truncate(0)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {now}")
        file.flush()
        yield


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file in hex. Raises `DataError` if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); restore it.") from None


def json_sha256(value: Any) -> str:
    """Return one sha256 in hex of anything JSON can hold: settings, other hashes, `file_stamps`."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def file_stamps(paths: list[Path]) -> list[tuple[str, int, int]]:
    """Return name, size and modification time of each file that exists, to notice changed inputs cheaply."""
    statuses = [(path, path.stat()) for path in paths if path.is_file()]
    return [(str(path), status.st_size, status.st_mtime_ns) for path, status in statuses]


def redact(text: str) -> str:
    """Return the text without passwords in addresses: no `user:password@`, no `?token=...`."""
    text = re.sub(r"(?<=://)[^/\s'\"]*@", "", text)
    return re.sub(r"(?i)([?&][a-z_]*(?:password|passwd|token|secret|key)=)[^&\s'\"]+", r"\1***", text)
