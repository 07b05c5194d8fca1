"""Files and folders: whole or absent, and private."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from finhpc.errors import ConfigError, DataError, RunBusyError
from finhpc.files import (
    file_sha256,
    file_stamps,
    json_sha256,
    lock,
    partial_file,
    private_files,
    private_folder,
    publish,
    write_atomic,
    write_json,
)
from finhpc.runs.folder import RunFolder
from finhpc.training.journal import Journal


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def open_umask() -> object:
    before = os.umask(0o022)
    yield
    os.umask(before)


def make_folder(path: Path, content: str) -> Path:
    path.mkdir()
    (path / "file").write_text(content)
    return path


def test_a_published_folder_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    old = make_folder(tmp_path / "model", "old")
    publish(make_folder(tmp_path / "model.partial", "new"), old, over=True)
    assert (old / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_in_the_way_is_not_replaced_unasked(tmp_path: Path) -> None:
    old = make_folder(tmp_path / "model", "old")
    with pytest.raises(OSError, match="not empty"):
        publish(make_folder(tmp_path / "model.partial", "new"), old)
    assert (old / "file").read_text() == "old"


def test_renames_are_synced_into_their_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a power cut a rename is there only if the folder was synced after it."""
    order: list[str] = []
    real_sync, real_replace = os.fsync, os.replace

    def sync(opened: int) -> None:
        order.append("folder" if stat.S_ISDIR(os.fstat(opened).st_mode) else "file")
        real_sync(opened)

    def rename(*names: Path) -> None:
        order.append("rename")
        real_replace(*names)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", rename)
    write_atomic(tmp_path / "a.json", "{}")
    assert order == ["file", "rename", "folder"]
    order.clear()
    publish(make_folder(tmp_path / "partial", "new"), tmp_path / "model")
    assert order == ["file", "folder", "folder"], "its files, itself, and the folder that it is in"


def test_a_failed_write_leaves_no_draft(tmp_path: Path) -> None:
    (tmp_path / "result.json").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_atomic(tmp_path / "result.json", "{}")
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.usefixtures("open_umask")
def test_run_folders_and_journals_are_private_whoever_calls(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "runs", "run")
    with folder.lock():
        Journal(folder.path / "journal.jsonl").close()
    assert mode(folder.path) == 0o700
    assert mode(folder.path / "journal.jsonl") == 0o600


@pytest.mark.usefixtures("open_umask")
def test_the_mask_may_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINHPC_UMASK", "027")
    private_folder(tmp_path / "shared")
    with private_files():
        write_atomic(tmp_path / "file", "text")
    assert (mode(tmp_path / "shared"), mode(tmp_path / "file")) == (0o750, 0o640)
    monkeypatch.setenv("FINHPC_UMASK", "rwx")
    with pytest.raises(ConfigError, match="FINHPC_UMASK=rwx is not an octal number"), private_files():
        pass


def test_a_partial_file_replaces_the_old_one_only_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(FileExistsError), partial_file(path) as partial:
        partial.write_text("half") and partial.touch(exist_ok=False)
    assert path.read_text() == "old"
    with partial_file(path) as partial:
        partial.write_text("new")
    assert path.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "no temporary file is left"


def test_a_lock_names_its_holder_and_ends_with_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    busy = rf"out=here is busy: process {holder.pid} on \S+ since .*; wait until that ends, or choose another --out\."
    with pytest.raises(RunBusyError, match=busy), lock(path, "out=here", "choose another --out"):
        pass
    holder.kill()
    holder.wait()
    with lock(path, "out=here", "choose another --out"):
        assert str(os.getpid()) in path.read_text()


HOLD = """
import sys, time
from pathlib import Path
from finhpc.files import lock
with lock(Path(sys.argv[1]), "out=here", "choose another --out"):
    print("locked", flush=True)
    time.sleep(600)
"""


def test_json_and_hashes_of_what_runs_depend_on(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"loss": float("nan"), "rows": (1, 2)})
    assert json.loads((tmp_path / "a.json").read_text()) == {"loss": "nan", "rows": [1, 2]}
    assert json_sha256({"a": 1, "b": [2]}) == json_sha256({"b": [2], "a": 1}) != json_sha256({"a": 1, "b": [3]})
    assert file_sha256(tmp_path / "a.json") == hashlib.sha256((tmp_path / "a.json").read_bytes()).hexdigest()
    with pytest.raises(DataError, match="cannot be read"):
        file_sha256(tmp_path / "absent")
    (stamp,) = file_stamps([tmp_path / "a.json", tmp_path / "absent"])
    assert stamp[:2] == (str(tmp_path / "a.json"), (tmp_path / "a.json").stat().st_size)
