"""The journal: nothing lost, nothing half read, every float exact."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finhpc.training.journal import Journal, latest, read


def test_floats_round_trip_exactly(tmp_path: Path) -> None:
    rng = random.Random(0)
    values = [0.1 + 0.2, 5e-324, 1.7976931348623157e308, -0.0]
    finite = (struct.unpack("<d", rng.randbytes(8))[0] for _ in range(2000))
    values += [value for value in finite if math.isfinite(value)]
    journal = Journal(tmp_path / "journal.jsonl")
    for step, value in enumerate(values):
        journal.write("train", step=step, train_loss=value)
    records, _ = read(journal.path)
    assert [struct.pack("<d", r["train_loss"]) for r in records] == [struct.pack("<d", v) for v in values]


def test_non_finite_floats_are_strict_json_and_come_back(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.write("train", step=1, train_loss=math.nan, grad_norm=math.inf, peaks=[-math.inf, 1.0])
    json.loads(journal.path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    ((record,), _) = read(journal.path)
    assert math.isnan(record["train_loss"])
    assert record["grad_norm"] == math.inf
    assert record["peaks"] == [-math.inf, 1.0]


def test_reading_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    assert read(path) == ([], 0)  # not written yet
    journal = Journal(path)
    journal.write("message", text="café\nzwei")
    first, offset = read(path)
    assert first[0]["text"] == "café\nzwei"
    assert read(path, offset) == ([], offset)
    for step in range(5):
        journal.write("train", step=step)
    part, offset = read(path, offset, limit=2)
    rest, offset = read(path, offset)
    assert [r["step"] for r in part + rest] == [0, 1, 2, 3, 4]
    assert offset == path.stat().st_size


def test_a_cut_last_line_waits_and_a_new_writer_starts_a_new_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "journal.jsonl"
    first = Journal(path)
    first.write("train", step=1)
    whole = path.stat().st_size
    first.write("train", step=2)
    os.truncate(path, path.stat().st_size - 7)
    records, offset = read(path)
    assert [r["step"] for r in records] == [1]
    assert offset == whole
    assert not capsys.readouterr().err

    second = Journal(path)
    second.write("train", step=2)
    second.write("train", step=3)
    records, offset = read(path, offset)
    assert [r["step"] for r in records] == [2, 3]
    assert offset == path.stat().st_size
    warning = capsys.readouterr().err
    assert warning.startswith("warning: ")
    assert "broken line" in warning


def test_a_full_disk_is_an_error_and_costs_only_the_line_it_hit(tmp_path: Path) -> None:
    script = """
import resource, signal, sys
from finhpc.training.journal import Journal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
journal = Journal(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (150, resource.RLIM_INFINITY))
try:
    for step in range(10):
        journal.write("train", step=step)
except OSError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
journal.write("train", step=99)
"""
    path = tmp_path / "journal.jsonl"
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)
    assert "bytes were written" in done.stdout
    steps = [r["step"] for r in read(path)[0]]
    assert steps[-1] == 99
    assert steps[:-1] == list(range(len(steps) - 1)) != []


def test_a_killed_writer_loses_at_most_the_line_it_was_writing(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    script = "import sys; from finhpc.training.journal import Journal; j = Journal(sys.argv[1])\nstep = 0\n"
    script += "while True: j.write('train', step=step, text='x' * 5000); step += 1"
    writer = subprocess.Popen([sys.executable, "-c", script, path])
    while not path.exists() or path.stat().st_size < 1_000_000:
        time.sleep(0.01)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    Journal(path).write("train", step=-1)
    steps = [r["step"] for r in read(path)[0]]
    assert steps == [*range(len(steps) - 1), -1]


def test_latest_keeps_the_last_record_of_a_repeated_step() -> None:
    def train(step: int, loss: float) -> dict[str, object]:
        return {"kind": "train", "time": 0.0, "step": step, "train_loss": loss}

    records = [train(1, 5.0), train(2, 4.0), {"kind": "eval", "time": 0.0, "step": 2}, train(2, 4.5)]
    assert {step: r["train_loss"] for step, r in latest(records, "train").items()} == {1: 5.0, 2: 4.5}
