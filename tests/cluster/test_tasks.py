"""Resumable parallel tasks: the folder they work in, and what becomes of their errors."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from finhpc.cluster.tasks import UnfinishedError, WorkerDiedError, is_finished, run_tasks, stream_task, workplace
from finhpc.errors import ConfigError, DataError, RunBusyError


def check(out: Path) -> bool:
    return is_finished(out, "result.json", "abc", "shards", out.with_name("out.partial"))


def test_only_the_same_settings_are_finished(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert not check(out)
    out.mkdir()
    assert not check(out)
    (out / "other").touch()
    with pytest.raises(ConfigError, match="holds other files; choose an empty or new folder"):
        check(out)
    (out / "result.json").write_text(json.dumps({"settings_sha256": "abc"}))
    assert check(out)
    (out / "result.json").write_text(json.dumps({"settings_sha256": "other"}))
    with pytest.raises(ConfigError, match="already holds shards made with other settings or from another source"):
        check(out)


def test_a_file_and_a_closed_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file; give a folder"):
        check(tmp_path / "file")
    with pytest.raises(ConfigError, match="cannot be written"):
        check(Path("/proc/nowhere/out"))


def test_a_workplace_keeps_work_of_the_same_settings_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = tmp_path / "work"
    for settings, survives in (("a", False), ("a", True), ("b", False)):
        with workplace(work, tmp_path, settings):
            assert (work / "done").exists() == survives
            (work / "done").touch()
    assert "discarding the unfinished work" in capsys.readouterr().err
    with pytest.raises(UnfinishedError), workplace(work, tmp_path, "b"):
        raise UnfinishedError("disk full")
    assert (work / "done").exists()
    with pytest.raises(DataError), workplace(work, tmp_path, "b"):
        raise DataError("broken text")
    assert not work.exists()


def test_a_task_that_still_writes_does_not_hide_why_the_work_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rmtree, late = shutil.rmtree, [True]

    def remove(path: Path, ignore_errors: bool = False) -> None:
        if not late:
            rmtree(path, ignore_errors=ignore_errors)
        elif late.pop() and not ignore_errors:
            raise OSError("Directory not empty")

    monkeypatch.setattr(shutil, "rmtree", remove)
    with pytest.raises(DataError, match="broken text"), workplace(tmp_path / "work", tmp_path, "a"):
        raise DataError("broken text")
    assert not (tmp_path / "work").exists()


def test_a_workplace_is_for_one_process(tmp_path: Path) -> None:
    with (
        workplace(tmp_path / "work", tmp_path, "a"),
        pytest.raises(RunBusyError, match=r"out=\S+ is busy: process \d+ on \S+ since .*; wait until that ends"),
        workplace(tmp_path / "work", tmp_path, "a"),
    ):
        pass


def work_of(item: int) -> int:
    if item == 1:
        raise DataError("line 3: broken")
    if item == 2:
        raise OSError("disk full")
    if item == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return item * 10


@pytest.mark.usefixtures("ray_cluster")
def test_tasks_return_results_and_errors_as_they_are() -> None:
    def run(items: list[int]) -> dict[int, int]:
        return dict(run_tasks(work_of, items, lambda item: f"item {item}", width=2))

    assert run([4, 5, 6]) == {4: 40, 5: 50, 6: 60}
    with pytest.raises(DataError, match=r"^line 3: broken$"):
        run([4, 1])
    with pytest.raises(UnfinishedError, match=r"^item 2: OSError: disk full; fix this and rerun the command; finished"):
        run([4, 2])
    with pytest.raises(WorkerDiedError, match=r"^item 3: "):
        run([4, 3])


def counting(end: int) -> Iterator[int]:
    for item in range(end):
        yield work_of(item + 4)
    yield work_of(end)


@pytest.mark.usefixtures("ray_cluster")
def test_a_stream_returns_results_and_errors_as_they_are() -> None:
    def run(end: int, ahead: int | None) -> Iterator[int]:
        return stream_task(counting, end, "counting", ahead, cpus=1, gpus=0)

    assert list(run(7, 2)) == list(run(7, None)) == [40, 50, 60, 70, 80, 90, 100, 70]
    for end, error, message in (
        (1, DataError, r"^line 3: broken$"),
        (2, UnfinishedError, r"^counting: OSError: disk full; fix this and rerun"),
        (3, WorkerDiedError, r"^counting: "),
    ):
        with pytest.raises(error, match=message):
            list(run(end, None))


def touching(folder: Path) -> Iterator[int]:
    for item in range(20):
        (folder / f"{item}").touch()
        yield item


@pytest.mark.usefixtures("ray_cluster")
def test_a_stream_is_only_so_far_ahead(tmp_path: Path) -> None:
    results = stream_task(touching, tmp_path, "touching", 3, cpus=1, gpus=0)
    assert [next(results) for _ in range(4)] == [0, 1, 2, 3]
    time.sleep(1)
    assert len(list(tmp_path.iterdir())) <= 4 + 3 + 1
    assert list(results) == list(range(4, 20))
