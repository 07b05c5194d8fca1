"""Decoded shards that the replicas of a run on one machine share.

Samples are drawn from all shards of a visit, so every replica needs some rows of each. The first replica that needs a
shard reads, verifies and decodes it into a file of plain ids; all of them map that file and read only their own rows.
Without this every replica would read every byte: R times the text per epoch for R replicas.

    TMPDIR/finhpc-shards-UID/SHA256-BOOT     the ids of the shard with that sha256, which is that of its parquet file

Files are not synced to the disk, and after a power cut they may hold anything; so those of another boot are not used.
The folder is a cache: it holds a limited number of bytes, the least recently used files go first, and it can be removed
at any time.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np

from finhpc.data.shards.shards import Shards, Tokens

BOOT = Path("/proc/sys/kernel/random/boot_id")  # of Linux; another system has no cache


def decoded(shards: Shards, index: int, limit: int) -> Tokens:
    """Return all blocks of a train shard, (blocks, block_len), read-only, from this machine's cache.

    `limit`: the bytes that the cache may have. Where it cannot be written the blocks are read as `Shards.read_shard`
    does. Raises `DataError` like that for a shard that is not the one that was prepared.
    """
    shard, manifest = shards.manifest.splits["train"][index], shards.manifest
    shape, dtype = (shard.blocks, manifest.block_len), np.dtype(manifest.dtype)
    size = shape[0] * shape[1] * dtype.itemsize
    if (folder := _folder()) is None or not size:
        return shards.read_shard("train", index)
    file = folder / f"{shard.sha256}-{_boot()}"
    try:
        with open(file.with_suffix(".lock"), "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the replicas of a machine need a shard at the same time
            if not (file.is_file() and file.stat().st_size == size):
                blocks = shards.read_shard("train", index)
                partial = file.with_suffix(f".{os.getpid()}")
                try:
                    blocks.tofile(partial)
                    partial.replace(file)
                finally:
                    partial.unlink(missing_ok=True)
                _make_room(folder, limit)
            os.utime(file)
            return np.memmap(file, dtype, "r", shape=shape)
    except OSError:  # a full disk, or one without locks
        return shards.read_shard("train", index)


def _folder() -> Path | None:
    """Return the cache, which only this user can read and write; None if there can be none."""
    folder = Path(tempfile.gettempdir()) / f"finhpc-shards-{os.getuid()}"
    with suppress(OSError):
        _boot()
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if status.st_uid == os.getuid() and not status.st_mode & 0o077 and not folder.is_symlink():
            return folder
    return None


@cache
def _boot() -> str:
    return BOOT.read_text(encoding="ascii").strip()


def _make_room(folder: Path, limit: int) -> None:
    """Remove the least recently used files above `limit` bytes; who has mapped one keeps it."""
    files = []
    for file in folder.iterdir():
        with suppress(OSError):  # removed by another process
            status = file.stat()
            if file.suffix != ".lock":  # files left half-written by processes that were killed count, too
                files.append((status.st_mtime_ns, status.st_size, file))
    total = 0
    for _, size, file in sorted(files, reverse=True):
        total += size
        if total > limit:
            file.unlink(missing_ok=True)
            file.with_suffix(".lock").unlink(missing_ok=True)
