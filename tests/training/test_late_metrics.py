"""Metrics that are read a step late, on a pretended GPU: the journal is complete, and nothing bad is saved."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from finhpc.bench.measures.step import pretended
from finhpc.bench.pretend_gpu import CUDA
from finhpc.errors import NonFiniteError
from finhpc.models.families.registry import make_config, resolve_shape
from finhpc.settings.base import build
from finhpc.settings.pretrain import PretrainConfig
from finhpc.training.batches import TokenBatches
from finhpc.training.engine import Engine
from finhpc.training.journal import read
from finhpc.training.metrics import Metrics
from finhpc.training.trainer import Trainer

STEPS, VOCAB, SEQ = 7, 101, 16


def trainer(folder: Path) -> Trainer:
    tree: dict[str, Any] = {
        "model": {"preset": "gpt2-tiny", "vocab_size": VOCAB, "context": SEQ, "layers": 1, "width": 16, "heads": 2},
        "method": {"kind": "dense"},
        "data": {"seq_len": SEQ},
        "parallel": {"micro_batch_size": 2},
        "train": {"steps": STEPS, "eval_every": 3, "checkpoint_every": 5, "hang_timeout_s": 0, "compile": "off"},
    }
    config = build(PretrainConfig, tree)

    def stream(first_step: int, replica: int) -> Iterator[dict[str, Any]]:
        for step in range(first_step, STEPS):
            yield {"tokens": np.zeros((2, SEQ), np.int64), "sample": np.arange(2), "position": 2 * step + np.arange(2)}

    hf_config = make_config(resolve_shape(config.model), {}, "dense")
    source = TokenBatches(config.parallel, stream, np.zeros((2, SEQ), np.int64))
    return Trainer(config, hf_config, lambda module, name: None, CUDA, folder, source)


def test_the_journal_of_a_gpu_is_complete_and_in_order(tmp_path: Path) -> None:
    log: list[str] = []
    start, take = Engine.start_step, Metrics.read

    def start_step(engine: Engine, *args: Any) -> Metrics:
        log.append(f"start {engine.step + 1}")
        return start(engine, *args)

    def read_metrics(metrics: Metrics) -> tuple[float, float]:
        log.append(f"read {metrics.step}")
        return take(metrics)

    with pretended(), patch.object(Engine, "start_step", start_step), patch.object(Metrics, "read", read_metrics):
        trainer(tmp_path).run()
    records, _ = read(tmp_path / "journal.jsonl")
    kinds = [
        (record["kind"], record.get("step")) for record in records if record["kind"] in ("train", "eval", "checkpoint")
    ]
    train = [("train", step) for step in range(1, STEPS + 1)]
    wanted = [*train[:3], ("eval", 3), *train[3:5], ("checkpoint", 5), train[5], ("eval", 6), train[6], ("eval", 7)]
    assert kinds == [*wanted, ("checkpoint", 7)]
    order = ["start 1", "start 2", "read 1", "start 3", "read 2", "read 3", "start 4", "start 5", "read 4", "read 5"]
    assert log == [*order, "start 6", "read 6", "start 7", "read 7"]
    assert all(record["step_s"] > 0 for record in records if record["kind"] == "train")


def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved(tmp_path: Path) -> None:
    made = Metrics.__init__

    def spoiled(metrics: Metrics, step: int, loss: torch.Tensor, norm: torch.Tensor) -> None:
        made(metrics, step, loss, norm)
        if step == 5:
            metrics._values = torch.tensor([float("nan"), 1.0])

    with (
        pretended(),
        patch.object(Metrics, "__init__", spoiled),
        pytest.raises(NonFiniteError, match="train_loss=nan at step 5"),
    ):
        trainer(tmp_path).run()
    records, _ = read(tmp_path / "journal.jsonl")
    assert [record["step"] for record in records if record["kind"] == "train"] == [1, 2, 3, 4]
    assert not list((tmp_path / "checkpoints").glob("step_*"))
