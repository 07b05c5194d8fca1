"""A Ray of a command's own that does not start: tried again if the machine may be busy, else remedies and logs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from finhpc.cluster import own_ray as own
from finhpc.errors import TrainingFailedError

# What Ray raises, in its own words.
TIMED_OUT = "The current node timed out during startup. This could happen because the GCS has become overloaded."
BROKEN = "The object store is too small."


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[Path]]:
    """Let the next starts of Ray raise these messages; None for one that works. Returns the folders of the starts."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(own, "_shut_down", lambda: None)

    def install(*messages: str | None) -> list[Path]:
        left, folders = list(messages), []

        def init(*_: Any, _temp_dir: str, **options: Any) -> None:
            folders.append(Path(_temp_dir))
            if (message := left.pop(0)) is not None:
                raise Exception(message)

        monkeypatch.setattr(ray, "init", init)
        return folders

    return install


def test_a_start_that_takes_too_long_is_tried_once_more(
    starts: Callable[..., list[Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    folders = starts(TIMED_OUT, None)
    with own.own_ray(1):
        first, second = folders
    line = capsys.readouterr().err
    assert line.startswith("warning: Ray did not start on this machine: The current node timed out")
    assert line.endswith(f"Its logs are in {first / 'session_latest/logs'}; trying once more.\n")
    assert first.is_dir(), "the message names its logs"
    assert not second.exists()


def test_a_second_one_names_logs_and_remedies(starts: Callable[..., list[Path]], tmp_path: Path) -> None:
    folders = starts(TIMED_OUT, TIMED_OUT)
    with pytest.raises(TrainingFailedError) as failed, own.own_ray(1):
        pass
    for words in (
        f"Its logs are in {folders[1] / 'session_latest/logs'}",
        "busy or short of memory (load ",
        "`pgrep -fl raylet`",
        f"If RAY_TMPDIR={tmp_path} is on a network disk, set RAY_TMPDIR to a short path",
    ):
        assert words in str(failed.value)
    assert folders[1].is_dir()


def test_another_error_is_not_tried_again(starts: Callable[..., list[Path]]) -> None:
    folders = starts(BROKEN)
    with pytest.raises(TrainingFailedError, match=r"too small\. Its logs are in .*/logs; fix this"), own.own_ray(1):
        pass
    assert len(folders) == 1


def test_workers_run_at_the_niceness_of_the_command_and_their_threads_soon_sleep() -> None:
    program = """
import os, ray
from finhpc.cluster.own_ray import own_ray

with own_ray(1):
    worker = ray.remote(lambda: (os.nice(0), os.environ.get("GOMP_SPINCOUNT")))
    print(ray.get(worker.remote()) == (os.nice(0), "1000"))
"""
    unset = {name for name in os.environ if name in {"GOMP_SPINCOUNT", "RAY_worker_niceness", "RAY_ADDRESS"}}
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == ["True"]
