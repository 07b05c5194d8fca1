"""A flipped bit is seen where a manifest lies beside the weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from finhpc.errors import CheckpointError
from finhpc.models.loading import load_model
from finhpc.models.manifest import check_manifest, write_manifest
from tests.models.dense import saved, tiny_llama


def test_a_flipped_bit_and_a_missing_file_are_named(tmp_path: Path) -> None:
    saved(tiny_llama(), tmp_path)
    check_manifest(tmp_path)
    write_manifest(tmp_path)
    load_model(tmp_path)
    file = tmp_path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not as it was written"):
        load_model(tmp_path)
    content[-5] ^= 1
    file.write_bytes(content)
    check_manifest(tmp_path)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        check_manifest(tmp_path)
