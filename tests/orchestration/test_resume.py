"""Killed anywhere, a run goes on to the same numbers: losses bit-equal, the same samples consumed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from finhpc.training.journal import latest, read
from tests.tiny import tiny_shards

STEPS = 120
FLAGS = [
    *("--model.preset", "gpt2-tiny", "--model.layers", "3", "--model.width", "32", "--model.context", "64"),
    *("--model.dropout", "0.1", "--method.rank", "8", "--data.seq_len", "32", "--data.eval_samples", "16"),
    *("--parallel.stages", "2", "--parallel.micro_batch_size", "2", "--parallel.micro_batches", "4"),
    *("--train.steps", str(STEPS), "--train.eval_every", "40", "--train.checkpoint_every", "15"),
]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_shards(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture(scope="module")
def unbroken(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    storage = tmp_path_factory.mktemp("unbroken")
    with command(storage, shards) as process:
        assert process.wait(240) == 0, (storage / "stderr").read_text()[-3000:]
    return outcome(storage) | {"token_mode": (storage / ".ray" / "auth_token").stat().st_mode}


@contextmanager
def command(storage: Path, shards: Path, *more: str) -> Iterator[subprocess.Popen[bytes]]:
    words = [sys.executable, "-m", "finhpc.cli", "pretrain", *FLAGS, "--data.shards", str(shards)]
    words += ["--run.storage", str(storage), "--run.name", "run", *more]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["HOME"] = str(storage)
    with open(storage / "stderr", "ab") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log, env=environment)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def outcome(storage: Path) -> dict[str, Any]:
    records, _ = read(storage / "run" / "journal.jsonl")
    result = json.loads((storage / "run" / "result.json").read_text())
    return {
        "train": {step: r["train_loss"] for step, r in latest(records, "train").items()},
        "norms": {step: r["grad_norm"] for step, r in latest(records, "train").items()},
        "eval": {step: r["val_loss"] for step, r in latest(records, "eval").items()},
        "consumed": result["consumed_sha256"],
        "starts": [r["step"] for r in records if r["kind"] == "start"],
        "status": result["status"],
    }


def wait_for_step(storage: Path, step: int, process: subprocess.Popen[bytes], timeout_s: float = 180) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        records, _ = read(storage / "run" / "journal.jsonl")
        if any(r["kind"] == "train" and r["step"] >= step for r in records):
            return
        assert process.poll() is None, (storage / "stderr").read_text()[-3000:]
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached: {(storage / 'stderr').read_text()[-3000:]}")


def train_workers(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The Ray Train workers of a command's own cluster."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if "TrainWorker" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found


def assert_same_run(resumed: dict[str, Any], unbroken: dict[str, Any]) -> None:
    assert resumed["status"] == "finished"
    assert len(unbroken["train"]) == STEPS
    for what in ("train", "norms", "eval"):
        assert resumed[what] == unbroken[what], what  # bit-equal: floats round-trip through the journal
    assert resumed["consumed"] == unbroken["consumed"]


def random_step() -> int:
    step = random.randint(16, 100)
    print(f"killing at step {step}")
    return step


def test_rays_token_is_the_users_alone(unbroken: dict[str, Any]) -> None:
    assert unbroken["token_mode"] & 0o077 == 0


def test_a_killed_worker_is_restarted_and_nothing_changes(
    shards: Path, unbroken: dict[str, Any], tmp_path: Path
) -> None:
    with command(tmp_path, shards) as process:
        wait_for_step(tmp_path, random_step(), process)
        workers = train_workers(process)
        assert len(workers) == 2
        random.choice(workers).send_signal(signal.SIGKILL)
        assert process.wait(240) == 0, (tmp_path / "stderr").read_text()[-3000:]
    resumed = outcome(tmp_path)
    assert len(resumed["starts"]) == 2
    assert resumed["starts"][1] > 0
    assert_same_run(resumed, unbroken)


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_stopped_driver_resumes_with_the_same_command(
    number: signal.Signals, shards: Path, unbroken: dict[str, Any], tmp_path: Path
) -> None:
    with command(tmp_path, shards) as process:
        wait_for_step(tmp_path, random_step(), process)
        process.send_signal(number)
        code = process.wait(60)
        assert code == (143 if number == signal.SIGTERM else -signal.SIGKILL)
    if number == signal.SIGTERM:
        assert outcome(tmp_path)["status"] == "killed"
    with command(tmp_path, shards) as process:
        assert process.wait(240) == 0, (tmp_path / "stderr").read_text()[-3000:]
    resumed = outcome(tmp_path)
    assert resumed["starts"][-1] > 0
    assert_same_run(resumed, unbroken)


@pytest.mark.slow
def test_another_number_of_stages_resumes_within_rounding(shards: Path, tmp_path: Path) -> None:
    without_dropout = ("--model.dropout", "0")
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    with command(tmp_path / "one", shards, *without_dropout) as process:
        assert process.wait(240) == 0
    with command(tmp_path / "two", shards, *without_dropout) as process:
        wait_for_step(tmp_path / "two", 50, process)
        process.kill()
        process.wait()
    with command(tmp_path / "two", shards, *without_dropout, "--parallel.stages", "1") as process:
        assert process.wait(240) == 0, (tmp_path / "two" / "stderr").read_text()[-3000:]
    plain, moved = outcome(tmp_path / "one"), outcome(tmp_path / "two")
    assert moved["starts"][-1] > 0
    assert moved["train"] == pytest.approx(plain["train"], rel=1e-5)
    assert moved["consumed"] == plain["consumed"]
