"""The sha256 of a model folder's weights, stored with them, so that a flipped bit is detected before it is used."""

from __future__ import annotations

import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from finhpc.errors import CheckpointError
from finhpc.files import file_sha256, private_folder, write_json

NAME = "weights_sha256.json"
REMEMBERED_BYTES = 16 << 20  # smaller files are hashed every time: that takes a hundredth of a second
FRESH_S = 5  # a file that changed this recently may change again within the resolution of its times
THREADS = 4  # files hashed at the same time


def write_manifest(folder: Path) -> None:
    """Write `folder`/weights_sha256.json: name -> sha256 of every safetensors file."""
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    (folder / NAME).write_text(json.dumps({"sha256": _hashes(folder, names)}, indent=1) + "\n", encoding="utf-8")


def weights_fingerprint(folder: Path) -> str:
    """Return one hash of a model folder's config and weights, or of a GGUF file.

    Raises `CheckpointError` naming every file that differs from its manifest, if there is one.
    """
    if folder.is_file():
        return weight_sha256(folder)
    hashes = check_manifest(folder) | {"config.json": file_sha256(folder / "config.json")}
    hashes |= _hashes(folder, [path.name for path in folder.glob("*.safetensors") if path.name not in hashes])
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def check_manifest(folder: Path, quickly: bool = False) -> dict[str, str]:
    """Return the sha256 of every file that a folder's manifest names; empty without a manifest.

    `quickly`: large files that changed since they were last hashed are not read, and count as right; for a dry run.
    Raises `CheckpointError` naming every file that differs.
    """
    if not (folder / NAME).is_file():
        return {}
    try:
        expected: dict[str, str] = dict(json.loads((folder / NAME).read_bytes())["sha256"])
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{folder / NAME} is cut short or damaged; make or fetch the model again.") from None
    present = [name for name in expected if (folder / name).is_file()]
    found = _hashes(folder, [name for name in present if not (quickly and _must_be_read(folder / name))])
    problems = []
    for name, sha256 in expected.items():
        file = folder / name
        if name not in present:
            problems.append(f"{file} is missing, which {NAME} names; make or fetch the model again.")
        elif found.get(name, sha256) != sha256:
            problems.append(f"{file} is not as it was written ({NAME}'s sha256 differs); make or fetch it again.")
    if problems:
        raise CheckpointError("\n".join(problems))
    return expected


def _hashes(folder: Path, names: list[str]) -> dict[str, str]:
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(names, pool.map(weight_sha256, [folder / name for name in names]), strict=True))


def weight_sha256(path: Path) -> str:
    """Return the sha256 of a file of weights, which is read only if it changed since it was last hashed.

    The hash of a large file is remembered in the user's cache (XDG_CACHE_HOME, by default ~/.cache) with the file's
    path, size, inode, and times of the last change of its content (mtime) and of its content or properties (ctime).
    Every write sets ctime, and no program can set it to another time; so a file that was changed and got its old mtime
    back is read again. Damage to the disk itself changes none of these: it is found only when the file is read, which
    it is after `touch`. Raises `DataError` if the file cannot be read.
    """
    before = _stamp(path)
    if before is None or before["size"] < REMEMBERED_BYTES:
        return file_sha256(path)
    if (known := _remembered(before)) is not None:
        return known
    began = time.time()
    sha256 = file_sha256(path)
    settled = began - max(before["mtime_ns"], before["ctime_ns"]) / 1e9 > FRESH_S
    if settled and _stamp(path) == before and (memory := _memory(before)) is not None:
        with suppress(OSError):  # then it is read again the next time
            private_folder(memory.parent)
            write_json(memory, before | {"sha256": sha256})
    return sha256


def _must_be_read(path: Path) -> bool:
    """Return whether a file is large and its hash is not known."""
    stamp = _stamp(path)
    return stamp is not None and stamp["size"] >= REMEMBERED_BYTES and _remembered(stamp) is None


def _remembered(stamp: dict[str, Any]) -> str | None:
    if (memory := _memory(stamp)) is not None:
        with suppress(OSError, ValueError, KeyError, TypeError):  # nothing remembered, or nothing that can be used
            stored = json.loads(memory.read_bytes())
            if {key: stored[key] for key in stamp} == stamp:
                return str(stored["sha256"])
    return None


def _memory(stamp: dict[str, Any]) -> Path | None:
    """Return the file that remembers the hash of a file; None if this user has no cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    name = hashlib.sha256(os.fsencode(stamp["path"])).hexdigest()
    return Path(cache, "finhpc", "sha256", f"{name}.json") if os.path.isabs(cache) else None


def _stamp(path: Path) -> dict[str, Any] | None:
    """Return what tells that a file was changed; None if it cannot be read."""
    try:
        status = path.stat()
    except OSError:
        return None
    return {
        "path": str(path.resolve()),
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "ctime_ns": status.st_ctime_ns,
        "inode": status.st_ino,
    }
