"""Killed anywhere, a run goes on to the same numbers: losses bit-equal, the same samples consumed."""

from __future__ import annotations

import random
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.runs.runs import assert_same_run, command, last_words, outcome, train_workers, wait_for_step
from tests.waiting import PATIENCE_S

pytestmark = pytest.mark.slow  # `test_faults` kills a command and workers at fixed points


def random_step() -> int:
    step = random.randint(16, 100)
    print(f"killing at step {step}")
    return step


def test_a_killed_worker_is_restarted_and_nothing_changes(
    run_shards: Path, unbroken: dict[str, Any], tmp_path: Path
) -> None:
    with command(tmp_path, run_shards) as process:
        wait_for_step(tmp_path, random_step(), process)
        workers = train_workers(process)
        assert len(workers) == 2
        random.choice(workers).send_signal(signal.SIGKILL)
        assert process.wait(PATIENCE_S) == 0, (tmp_path / "stderr").read_text()[-3000:]
    resumed = outcome(tmp_path)
    assert len(resumed["starts"]) == 2
    assert resumed["starts"][1] > 0
    assert_same_run(resumed, unbroken)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_driver_resumes_with_the_same_command(
    number: signal.Signals, run_shards: Path, unbroken: dict[str, Any], tmp_path: Path
) -> None:
    with command(tmp_path, run_shards) as process:
        wait_for_step(tmp_path, random_step(), process)
        process.send_signal(number)
        code = process.wait(PATIENCE_S)
        assert code == (143 if number == signal.SIGTERM else -signal.SIGKILL)
    last = 0
    if number == signal.SIGTERM:
        stopped = outcome(tmp_path)
        assert stopped["status"] == "killed"
        last = max(stopped["train"])
        assert f"stopped after step {last}, which is saved" in last_words(tmp_path)
    with command(tmp_path, run_shards) as process:
        assert process.wait(PATIENCE_S) == 0, (tmp_path / "stderr").read_text()[-3000:]
    resumed = outcome(tmp_path)
    assert resumed["starts"][-1] >= max(last, 1)
    assert_same_run(resumed, unbroken)


@pytest.mark.parametrize(("after_s", "gap_s"), [(0.3, 0.5), (2, 1.5), (6, 0.3), (9, 1)])
def test_two_ctrl_c_while_it_starts_leave_nothing_and_the_run_resumes(
    after_s: float, gap_s: float, run_shards: Path, unbroken: dict[str, Any], tmp_path: Path
) -> None:
    own = Path(tempfile.mkdtemp(dir="/tmp"))  # a short path, as Ray's sockets need
    with command(tmp_path, run_shards, RAY_TMPDIR=str(own)) as process:
        while "starting Ray" not in last_words(tmp_path):
            assert process.poll() is None
        time.sleep(after_s)
        process.send_signal(signal.SIGINT)
        time.sleep(gap_s)
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 130
    assert not psutil.wait_procs(children, timeout=100)[1]
    own.rmdir()  # there is nothing in it
    words = last_words(tmp_path)
    assert not any(bad in words for bad in ("Traceback", "Fatal", "ignored", "error")), words
    with command(tmp_path, run_shards) as process:
        assert process.wait(PATIENCE_S) == 0, last_words(tmp_path)
    assert_same_run(outcome(tmp_path), unbroken)


def test_a_run_goes_on_to_the_same_numbers_with_another_recomputation(
    run_shards: Path, unbroken: dict[str, Any], tmp_path: Path
) -> None:
    with command(tmp_path, run_shards) as process:
        wait_for_step(tmp_path, 50, process)
        process.kill()
        process.wait()
    cut = (tmp_path / "run" / "stages.json").read_text()
    with command(tmp_path, run_shards, "--train.recompute", "attention") as process:
        assert process.wait(PATIENCE_S) == 0, (tmp_path / "stderr").read_text()[-3000:]
    assert (tmp_path / "run" / "stages.json").read_text() == cut
    resumed = outcome(tmp_path)
    assert resumed["starts"][-1] > 0
    assert_same_run(resumed, unbroken)


def test_another_number_of_stages_resumes_within_rounding(run_shards: Path, tmp_path: Path) -> None:
    without_dropout = ("--model.dropout", "0")
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    with command(tmp_path / "one", run_shards, *without_dropout) as process:
        assert process.wait(PATIENCE_S) == 0
    with command(tmp_path / "two", run_shards, *without_dropout) as process:
        wait_for_step(tmp_path / "two", 50, process)
        process.kill()
        process.wait()
    with command(tmp_path / "two", run_shards, *without_dropout, "--parallel.stages", "1") as process:
        assert process.wait(PATIENCE_S) == 0, (tmp_path / "two" / "stderr").read_text()[-3000:]
    plain, moved = outcome(tmp_path / "one"), outcome(tmp_path / "two")
    assert moved["starts"][-1] > 0
    assert moved["train"] == pytest.approx(plain["train"], rel=1e-5)
    assert moved["consumed"] == plain["consumed"]
