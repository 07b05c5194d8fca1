"""The time that a training waits for data, as its journal has it: opening the data is no part of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from finhpc.data.shards.reader import ReplicaStream, Rows, local_stream
from finhpc.data.shards.shards import Shards
from finhpc.lowrank.replace import ranks_of
from finhpc.models.families.registry import make_config, resolve_shape
from finhpc.models.initialize import random_fill
from finhpc.settings.base import build
from finhpc.settings.pretrain import PretrainConfig
from finhpc.training.batches import TokenBatches
from finhpc.training.journal import latest, read
from tests.tiny import tiny_shards
from tests.training.processes import run_processes

OPENING_S = 2.0  # far longer than a step


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return Shards.open(str(tiny_shards(tmp_path_factory.mktemp("waiting") / "shards")))


def train(folder: Path, shards: Shards, steps: int, each_s: float = 0.0) -> tuple[list[dict[str, Any]], list[float]]:
    """Train up to step `steps` on data that opens slowly and then takes `each_s` per batch.

    Returns the records of this start's steps, and how long each batch really took.
    """
    from finhpc.training.trainer import Trainer

    tree: dict[str, Any] = {
        "model": {"preset": "gpt2-tiny", "vocab_size": shards.manifest.vocab_size, "layers": 1, "width": 32},
        "method": {"kind": "dense"},
        "data": {"seq_len": 32, "eval_samples": 4},
        "parallel": {"micro_batch_size": 2, "micro_batches": 2},
        "train": {"steps": steps, "eval_every": 0, "checkpoint_every": 0, "hang_timeout_s": 0},
    }
    config = build(PretrainConfig, tree)

    slept: list[float] = []

    def stream(first_step: int, replica: int) -> Iterator[Rows]:
        time.sleep(OPENING_S)
        for batch in local_stream(ReplicaStream(shards, 32, 0, first_step, steps, 4, 2)):
            begin = time.perf_counter()
            time.sleep(each_s)
            slept.append(time.perf_counter() - begin)
            yield batch

    folder.mkdir(exist_ok=True)
    journal = folder / "journal.jsonl"
    _, before = read(journal)
    hf_config = make_config(resolve_shape(config.model), ranks_of(config.method), config.method.kind)
    worker = Trainer(
        config=config,
        hf_config=hf_config,
        fill=random_fill(hf_config, 0, config.method.init),
        device=torch.device("cpu"),
        folder=folder,
        source=TokenBatches(config.parallel, stream, shards.eval_samples(4, 32)),
    )
    worker.run()
    found = latest(read(journal, before)[0], "train")
    assert len(found) == steps - worker.resumed_from
    return [found[step] for step in sorted(found)], slept


def waited(steps: list[dict[str, Any]]) -> float:
    """Seconds, from the share that the last step's record has of all of them."""
    return float(steps[-1]["data_wait_fraction"]) * sum(step["step_s"] for step in steps)


def test_opening_the_data_is_no_wait_of_a_step_after_a_start_and_after_a_resume(tmp_path: Path, shards: Shards) -> None:
    for steps in (1, 4):  # the second start goes on from the first one's checkpoint
        ((last, _),) = run_processes(train, 1, tmp_path / "run", shards, steps)
        assert waited(last) < OPENING_S / 2


def test_data_that_is_slow_all_along_is_waited_for(tmp_path: Path, shards: Shards) -> None:
    """Batches are made one step ahead, so only what the work on others does not cover is waited for."""
    ((last, slept),) = run_processes(train, 1, tmp_path / "run", shards, 4, 1.0)
    assert 0.3 * sum(slept[1:]) < waited(last) < 1.1 * sum(slept)
