"""The sha256 of a model folder's weights, stored with them, so that a flipped bit is detected before it is used."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from finhpc.errors import CheckpointError
from finhpc.files import file_sha256

NAME = "weights_sha256.json"


def write_manifest(folder: Path) -> None:
    """Write `folder`/weights_sha256.json: name -> sha256 of every safetensors file."""
    files = {path.name: file_sha256(path) for path in sorted(folder.glob("*.safetensors"))}
    (folder / NAME).write_text(json.dumps({"sha256": files}, indent=1) + "\n", encoding="utf-8")


def weights_fingerprint(folder: Path) -> str:
    """Return one hash of a model folder's config and weights, or of a GGUF file.

    Raises `CheckpointError` naming every file that differs from its manifest, if there is one.
    """
    if folder.is_file():
        return file_sha256(folder)
    hashes = check_manifest(folder) | {"config.json": file_sha256(folder / "config.json")}
    for path in folder.glob("*.safetensors"):
        if path.name not in hashes:
            hashes[path.name] = file_sha256(path)
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def check_manifest(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file that a folder's manifest names; empty without a manifest.

    Raises `CheckpointError` naming every file that differs.
    """
    if not (folder / NAME).is_file():
        return {}
    try:
        expected: dict[str, str] = dict(json.loads((folder / NAME).read_bytes())["sha256"])
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{folder / NAME} is cut short or damaged; make or fetch the model again.") from None
    problems = []
    for name, sha256 in expected.items():
        file = folder / name
        if not file.is_file():
            problems.append(f"{file} is missing, which {NAME} names; make or fetch the model again.")
        elif file_sha256(file) != sha256:
            problems.append(f"{file} is not as it was written ({NAME}'s sha256 differs); make or fetch it again.")
    if problems:
        raise CheckpointError("\n".join(problems))
    return expected
