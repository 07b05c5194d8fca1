"""A flipped bit is seen where a manifest lies beside the weights."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from finhpc.commands.export import export
from finhpc.errors import CheckpointError
from finhpc.files import file_sha256
from finhpc.models.files import manifest
from finhpc.models.files.manifest import NAME, check_manifest, weights_fingerprint, write_manifest
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


@pytest.fixture
def hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are read to be hashed; any file is remembered, in a cache of its own."""
    names: list[str] = []

    def reading(path: Path) -> str:
        names.append(path.name)
        return file_sha256(path)

    monkeypatch.setattr(manifest, "file_sha256", reading)
    monkeypatch.setattr(manifest, "REMEMBERED_BYTES", 0)
    monkeypatch.setattr(manifest, "FRESH_S", -1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return names


def test_weights_are_read_once_to_be_hashed(tmp_path: Path, hashed: list[str]) -> None:
    saved(tiny_llama(), tmp_path)
    write_manifest(tmp_path)
    first = weights_fingerprint(tmp_path)
    assert hashed == ["model.safetensors", "config.json"]
    hashed.clear()
    assert weights_fingerprint(tmp_path) == first
    check_manifest(tmp_path)
    link = tmp_path.with_name(f"{tmp_path.name}-link")
    link.symlink_to(tmp_path)
    assert weights_fingerprint(link) == first
    assert hashed == ["config.json"] * 2


def test_a_change_that_keeps_size_and_time_is_noticed(tmp_path: Path, hashed: list[str]) -> None:
    saved(tiny_llama(), tmp_path)
    write_manifest(tmp_path)
    check_manifest(tmp_path)
    file = tmp_path / "model.safetensors"
    before, content = file.stat(), bytearray(file.read_bytes())
    content[-5] ^= 1
    with open(file, "r+b") as opened:
        opened.write(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not as it was written"):
        check_manifest(tmp_path)


def test_a_new_file_is_not_remembered_yet(tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "FRESH_S", 60)
    saved(tiny_llama(), tmp_path)
    write_manifest(tmp_path)
    check_manifest(tmp_path)
    assert hashed == ["model.safetensors"] * 2
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("content", ["", "{}", "[]"])
def test_a_damaged_memory_is_replaced(content: str, tmp_path: Path, hashed: list[str]) -> None:
    saved(tiny_llama(), tmp_path)
    write_manifest(tmp_path)
    (memory,) = (tmp_path / "cache" / "finhpc" / "sha256").iterdir()
    memory.write_text(content)
    check_manifest(tmp_path)
    check_manifest(tmp_path)
    assert hashed == ["model.safetensors"] * 2


def test_a_dry_run_reads_no_large_file(tmp_path: Path, hashed: list[str]) -> None:
    saved(tiny_llama(), tmp_path)
    write_manifest(tmp_path)
    file = tmp_path / "model.safetensors"
    hashed.clear()
    check_manifest(tmp_path, quickly=True)
    file.write_bytes(b"another" + file.read_bytes())
    check_manifest(tmp_path, quickly=True)
    assert not hashed
    with pytest.raises(CheckpointError, match="is not as it was written"):
        check_manifest(tmp_path)
    with pytest.raises(CheckpointError, match="is not as it was written"):
        check_manifest(tmp_path, quickly=True)  # now its hash is known
    file.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        check_manifest(tmp_path, quickly=True)
