"""A whole `finhpc pretrain` compared with a plain torch loop over the same model and batches."""

from __future__ import annotations

import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from finhpc.bench.report import Row
from finhpc.bench.settings import TrainBench
from finhpc.bench.shards import random_shards
from finhpc.bench.timing import in_turn, median_ratio, spread
from finhpc.errors import TrainingFailedError
from finhpc.settings.base import to_yaml
from finhpc.settings.pretrain import PretrainConfig
from finhpc.training.journal import WORKER_FILE, latest, read

log = logging.getLogger(__name__)

LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 5e-3}  # relative; the two must train the same model on the same batches


def overhead(config: PretrainConfig, settings: TrainBench) -> tuple[list[Row], dict[str, float]]:
    """Tokens/s of finhpc (one stage, Ray, streaming, tracking) over a plain loop, in pairs of whole processes.

    Raises `TrainingFailedError` if a process fails or the two do not train alike.
    """
    steps, precision = settings.overhead_steps, config.train.precision
    os.makedirs(settings.bench.out, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=settings.bench.out, prefix=".overhead-") as temporary:
        folder = Path(os.path.abspath(temporary))
        tokens = 2 * steps * config.parallel.samples_per_step * config.data.seq_len
        shards = random_shards(folder / "shards", tokens, config.data.seq_len)
        config = config.model_copy(deep=True)
        config.data.shards, config.data.eval_samples = str(shards.folder), config.parallel.micro_batch_size
        config.train.steps, config.train.eval_every, config.train.checkpoint_every = steps, 0, 0
        config.run.storage = str(folder / "runs")
        records: dict[str, list[list[dict[str, float]]]] = {"finhpc": [], "plain": []}

        def measure(way: str) -> float:
            log.info(f"{precision}, {way}: {steps} steps (pair {len(records[way]) + 1} of {settings.overhead_pairs})")
            config.run.name = f"run-{len(records['finhpc'])}"
            records[way].append(_run(way, config, folder))
            return _tokens_per_s(records[way][-1], config)

        pace = in_turn({way: lambda way=way: measure(way) for way in records}, settings.overhead_pairs)  # type: ignore[misc]
    _check_alike(records["finhpc"][0], records["plain"][0], precision)
    rows = [_row(way, values, config, settings) for way, values in pace.items()]
    return rows, {f"overhead_{precision}": median_ratio(pace["finhpc"], pace["plain"])}


def _run(way: str, config: PretrainConfig, folder: Path) -> list[dict[str, float]]:
    """Train in a process of its own; returns the records of its steps."""
    path = folder / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    command = ["finhpc.cli", "pretrain", "--config"] if way == "finhpc" else ["finhpc.bench.plain.pretrain"]
    done = subprocess.run([sys.executable, "-m", *command, str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise TrainingFailedError(f"{' '.join(command[:2])} failed ({done.returncode}): {done.stderr[-500:]}")
    if way == "plain":
        plain: list[dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
        return plain
    train = latest(read(Path(config.run.storage) / config.run.name / WORKER_FILE)[0], "train")
    return [train[step] for step in sorted(train)]


def _tokens_per_s(records: list[dict[str, float]], config: PretrainConfig) -> float:
    """Over all steps except the first quarter, from record to record, so the time between steps counts too."""
    first = len(records) // 4
    span = records[-1]["time"] - records[first - 1]["time"]
    return (len(records) - first) * config.parallel.samples_per_step * config.data.seq_len / span


def _check_alike(ours: list[dict[str, float]], plain: list[dict[str, float]], precision: str) -> None:
    for mine, other in zip(ours, plain, strict=True):
        difference = abs(mine["train_loss"] / other["train_loss"] - 1)
        if not difference <= LOSS_TOLERANCE[precision]:
            raise TrainingFailedError(
                f"step {mine['step']:.0f}: finhpc's loss {mine['train_loss']:.6f}, the plain loop's "
                f"{other['train_loss']:.6f}; they do not train the same model on the same batches."
            )


def _row(way: str, values: list[float], config: PretrainConfig, settings: TrainBench) -> Row:
    pace = statistics.median(values)
    name = "finhpc pretrain (Ray, stream, tracking)" if way == "finhpc" else "plain loop over the same parts"
    row: dict[str, Any] = {
        "way": f"rank {settings.ranks[0]}, {name}",
        "precision": config.train.precision,
        "params": None,
        "step_s": config.parallel.samples_per_step * config.data.seq_len / pace,
        "tokens_per_s": pace,
    }
    unknown = dict.fromkeys(("matrix_gflops", "speedup", "limit", "speedup_over_limit"))
    return row | unknown | {"spread": spread(values)}
