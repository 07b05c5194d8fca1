"""`finhpc pretrain` as a process with its own Ray, or by warm workers: start it, watch it, compare what it gave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from finhpc.cli import parse
from finhpc.commands.pretrain import Pretrain
from finhpc.files import file_sha256
from finhpc.runs.folder import RunFolder
from finhpc.runs.job import Job
from finhpc.runs.launch import UseModel, launch_here
from finhpc.runs.launch_warm import launch_warm
from finhpc.runs.run import run
from finhpc.settings.base import load
from finhpc.settings.pretrain import PretrainConfig
from finhpc.training.journal import latest, read
from finhpc.training.stages import Cut
from tests import waiting
from tests.waiting import wait_until

STEPS = 120
HALTED_STEP = 30  # whose save `tests.runs.pauses` halts
FLAGS = [
    *("--model.preset", "gpt2-tiny", "--model.layers", "3", "--model.width", "32", "--model.context", "64"),
    *("--model.dropout", "0.1", "--method.rank", "8", "--data.seq_len", "32", "--data.eval_samples", "16"),
    *("--parallel.stages", "2", "--parallel.micro_batch_size", "2", "--parallel.micro_batches", "4"),
    *("--train.steps", str(STEPS), "--train.eval_every", "40", "--train.checkpoint_every", "15"),
]

# The cut of a run over two stages. Measured ones differ from run to run, and runs are bit-equal over the same alone.
PARTS = ["embedding", "positions", "dropout", *("attention", "mlp") * 3, "norm", "head"]
BORDERS = [0, 6, len(PARTS)]
CUT = asdict(Cut(schedule="1f1b", workers=2, kinds=PARTS, costs_s=[1.0] * len(PARTS), borders=BORDERS))


@contextmanager
def command(
    storage: Path, shards: Path, *more: str, flags: Sequence[str] = FLAGS, **variables: str
) -> Iterator[subprocess.Popen[bytes]]:
    """`finhpc pretrain` with its own Ray and home; its messages are in `storage/stderr`; killed on leaving."""
    words = [sys.executable, "-m", "finhpc.cli", "pretrain", *words_of(storage, shards, flags, more)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | variables
    environment["HOME"] = str(storage)
    if flags is FLAGS:
        write_cut(storage)
    with open(storage / "stderr", "ab") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log, env=environment)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def words_of(storage: Path, shards: Path, flags: Sequence[str], more: Sequence[str]) -> list[str]:
    return [*flags, "--data.shards", str(shards), "--run.storage", str(storage), "--run.name", "run", *more]


def write_cut(storage: Path) -> None:
    """Give the run its stages, unless it has them."""
    if not (kept := storage / "run" / "stages.json").exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(CUT))


def train_warm(storage: Path, shards: Path, *more: str, poll: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Train the same run by warm workers of this process's Ray; return its result."""
    write_cut(storage)
    config = load(PretrainConfig, None, parse(words_of(storage, shards, FLAGS, more), PretrainConfig)[1])
    return run(Pretrain(config), launch=partial(launch_warm, poll=poll))


def launch_quickly(job: Job, folder: RunFolder, cuda: bool) -> UseModel:
    """Train in this process, or by workers that stay for the next run."""
    if job.config.parallel.workers == 1:
        return launch_here(job, folder, cuda, on_eval=lambda record: None)
    return launch_warm(job, folder, cuda, poll=lambda: None)


def outcome(storage: Path) -> dict[str, Any]:
    records, _ = read(storage / "run" / "journal.jsonl")
    result = json.loads((storage / "run" / "result.json").read_text())
    return {
        "train": {step: r["train_loss"] for step, r in latest(records, "train").items()},
        "norms": {step: r["grad_norm"] for step, r in latest(records, "train").items()},
        "eval": {step: r["val_loss"] for step, r in latest(records, "eval").items()},
        "consumed": result["consumed_sha256"],
        "model": {file.name: file_sha256(file) for file in (storage / "run" / "model").glob("*.safetensors")},
        "starts": [r["step"] for r in records if r["kind"] == "start"],
        "status": result["status"],
    }


def wait_for_step(storage: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    wait_for_record(storage, process, lambda record: record["kind"] == "train" and record["step"] >= step)


def wait_for_record(storage: Path, process: subprocess.Popen[bytes], wanted: Callable[[dict[str, Any]], bool]) -> None:
    journal = storage / "run" / "journal.jsonl"
    wait_until(lambda: any(map(wanted, read(journal)[0])), process, storage / "stderr")


def last_words(storage: Path) -> str:
    return waiting.last_words(storage / "stderr")


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
    assert len(unbroken["model"]) > 0
    for what in ("train", "norms", "eval", "consumed", "model"):
        assert resumed[what] == unbroken[what], what  # bit-equal: floats round-trip through the journal
