"""The command as a process of its own, with a Ray of its own: start it, watch it, find its workers, compare runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from finhpc.training.journal import latest, read

STEPS = 120
HALTED_STEP = 30  # whose save `tests.runs.pauses` halts
PATIENCE_S = 500.0  # for a command to end, on a machine however loaded
FLAGS = [
    *("--model.preset", "gpt2-tiny", "--model.layers", "3", "--model.width", "32", "--model.context", "64"),
    *("--model.dropout", "0.1", "--method.rank", "8", "--data.seq_len", "32", "--data.eval_samples", "16"),
    *("--parallel.stages", "2", "--parallel.micro_batch_size", "2", "--parallel.micro_batches", "4"),
    *("--train.steps", str(STEPS), "--train.eval_every", "40", "--train.checkpoint_every", "15"),
]

# The cut of a run over two stages. Measured ones differ from run to run, and runs are bit-equal over the same alone.
PARTS = ["embedding", "positions", "dropout", *("attention", "mlp") * 3, "norm", "head"]
CUT = {"stages": 2, "kinds": PARTS, "costs_s": [1.0] * len(PARTS), "borders": [0, 6, len(PARTS)]}


@contextmanager
def command(
    storage: Path, shards: Path, *more: str, flags: Sequence[str] = FLAGS, **variables: str
) -> Iterator[subprocess.Popen[bytes]]:
    """`finhpc pretrain` with its own Ray and home; its words in `storage/stderr`; killed on leaving."""
    words = [sys.executable, "-m", "finhpc.cli", "pretrain", *flags, "--data.shards", str(shards)]
    words += ["--run.storage", str(storage), "--run.name", "run", *more]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | variables
    environment["HOME"] = str(storage)
    if flags is FLAGS and not (kept := storage / "run" / "stages.json").exists():
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(json.dumps(CUT))
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


def wait_for_step(storage: Path, step: int, process: subprocess.Popen[bytes], timeout_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        records, _ = read(storage / "run" / "journal.jsonl")
        if any(r["kind"] == "train" and r["step"] >= step for r in records):
            return
        assert process.poll() is None, last_words(storage)
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached: {(storage / 'stderr').read_text()[-3000:]}")


def last_words(storage: Path) -> str:
    return (storage / "stderr").read_text(errors="replace")[-3000:]


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


def ray_process(process: subprocess.Popen[bytes], name: str) -> psutil.Process:
    """A process of the command's own Ray: raylet, gcs_server, ..."""
    return next(p for p in psutil.Process(process.pid).children(recursive=True) if p.name() == name)


def assert_same_run(resumed: dict[str, Any], unbroken: dict[str, Any]) -> None:
    assert resumed["status"] == "finished"
    assert len(unbroken["train"]) == STEPS
    for what in ("train", "norms", "eval"):
        assert resumed[what] == unbroken[what], what  # bit-equal: floats round-trip through the journal
    assert resumed["consumed"] == unbroken["consumed"]
