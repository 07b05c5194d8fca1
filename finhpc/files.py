"""Files and folders that are there whole or not at all, also after a power cut, and readable by their user alone."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finhpc.errors import ConfigError

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
    """Make what is written meanwhile readable by its user alone: shards, examples and models come from private text.

    FINHPC_UMASK, an octal number such as 027, shares it. Raises `ConfigError` for another value.
    """
    before = os.umask(_mask())
    try:
        yield
    finally:
        os.umask(before)


def private_folder(path: Path) -> None:
    """Make a folder, if it is not there, that its user alone may read, unless FINHPC_UMASK says otherwise."""
    path.mkdir(parents=True, exist_ok=True, mode=0o777 & ~_mask())


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file whole or, after a crash at any moment, leave what was there before."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def replace(partial: Path, path: Path) -> None:
    """Put a file that was synced already in its place."""
    os.replace(partial, path)
    _sync(path.parent)


def publish(partial: Path, folder: Path, over: bool = False) -> None:
    """Put a finished folder in its place; `over` one that is there, which goes when the new one is safe on the disk.

    Raises `OSError` where something is in the way and not `over`.
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
    """Ask the disk to hold a file, or the entries of a folder."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def redact(text: str) -> str:
    """The text without the passwords of addresses: no `user:password@`, no `?token=...`."""
    text = re.sub(r"(?<=://)[^/\s'\"]*@", "", text)
    return re.sub(r"(?i)([?&][a-z_]*(?:password|passwd|token|secret|key)=)[^&\s'\"]+", r"\1***", text)
