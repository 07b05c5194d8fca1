"""A flipped bit is seen where a manifest lies beside the weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from finhpc.commands.export import export
from finhpc.errors import CheckpointError
from finhpc.models.files.manifest import NAME, check_manifest, write_manifest
from finhpc.models.loading import load_model
from finhpc.settings.base import build
from finhpc.settings.export import ExportConfig
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
    wanted = build(ExportConfig, {"model": str(tmp_path), "out": str(tmp_path / "out")})
    for way in (lambda: load_model(tmp_path), lambda: export(wanted)):
        with pytest.raises(CheckpointError, match=r"model\.safetensors is not as it was written"):
            way()
    content[-5] ^= 1
    file.write_bytes(content)
    check_manifest(tmp_path)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        check_manifest(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"sha256": null}', "{}"])
def test_a_damaged_manifest_is_one_error(text: str, tmp_path: Path) -> None:
    (tmp_path / NAME).write_text(text)
    with pytest.raises(CheckpointError, match="is cut short or damaged"):
        check_manifest(tmp_path)
