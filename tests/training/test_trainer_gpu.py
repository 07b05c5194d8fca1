"""A worker's whole life on a GPU: trained, evaluated, stopped in the middle and resumed, bit-equal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from finhpc.data.shards.reader import ReplicaStream, Rows, local_stream
from finhpc.data.shards.shards import Shards
from finhpc.lowrank.replace import ranks_of
from finhpc.models.families.registry import make_config, resolve_shape
from finhpc.models.initialize import random_fill
from finhpc.settings.base import build
from finhpc.settings.pretrain import PretrainConfig
from finhpc.training.batches import TokenBatches
from finhpc.training.checkpoint import Checkpointer
from finhpc.training.journal import latest, read
from finhpc.training.workers.resume import latest_valid
from tests.gpu import CUDA, DEVICE, alone, needs_gpu
from tests.tiny import tiny_shards
from tests.training.test_blend import checkpoint, losses

pytestmark = needs_gpu

STEPS, STOP = 8, 5
RUNS: dict[str, dict[str, Any]] = {
    "dense, dropout": {"model": {"dropout": 0.1}, "method": {"kind": "dense"}},
    "low-rank, full": {"method": {"kind": "low_rank", "rank": 8}, "train": {"recompute": "full"}},
    "blend": {"method": {"kind": "blend", "rank": 8, "blend_share": 0.75, "blend_weight": "trainable"}},
    "muon": {"method": {"kind": "dense"}, "optimizer": {"name": "muon"}},
    "loro": {"method": {"kind": "low_rank", "rank": 8}, "optimizer": {"name": "loro", "restart_every": 3}},
    "relora": {"method": {"kind": "dense"}, "optimizer": {"name": "relora", "rank": 4, "restart_every": 2}},
    "8-bit moments": {"method": {"kind": "dense"}, "optimizer": {"name": "adamw8bit"}},
}


def settings(shards: Shards, changes: dict[str, Any]) -> PretrainConfig:
    tree: dict[str, dict[str, Any]] = {
        "model": {"preset": "gpt2-tiny", "vocab_size": shards.manifest.vocab_size, "layers": 2, "width": 64},
        "data": {"seq_len": 64, "eval_samples": 8},
        "optimizer": {"lr": 3e-3, "warmup_steps": 2},
        "parallel": {"micro_batch_size": 4, "micro_batches": 2},
        "train": {"steps": STEPS, "eval_every": 3, "checkpoint_every": STOP, "hang_timeout_s": 0},
    }
    for section, values in changes.items():
        tree[section] = tree.get(section, {}) | values
    return build(PretrainConfig, tree)


class Stopped(Exception):
    pass


def train(folder: Path, config: PretrainConfig, shards: Shards, stop: int = STEPS) -> None:
    """Train from where the folder stands, and stop after step `stop` as if killed there."""
    from finhpc.training.trainer import Trainer

    class Stopping(Trainer):
        def _step(self, step: int) -> None:
            if step > stop:
                self.checkpointer.wait()
                raise Stopped
            super()._step(step)

    def stream(first_step: int, replica: int) -> Iterator[Rows]:
        size, per_step = config.parallel.micro_batch_size, config.parallel.samples_per_step
        return local_stream(ReplicaStream(shards, config.data.seq_len, 0, first_step, STEPS, per_step, size))

    folder.mkdir(exist_ok=True)
    hf_config = make_config(resolve_shape(config.model), ranks_of(config.method), config.method.kind)
    worker = Stopping(
        config=config,
        hf_config=hf_config,
        fill=random_fill(hf_config, 0, config.method.init),
        device=DEVICE,
        folder=folder,
        source=TokenBatches(
            config.parallel, stream, shards.eval_samples(config.data.eval_samples, config.data.seq_len)
        ),
    )
    try:
        worker.run()
    except Stopped:
        assert stop < STEPS
        dist.barrier()


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_was_stopped_is_the_unbroken_one_to_the_bit(tmp_path: Path, name: str) -> None:
    shards = Shards.open(str(tiny_shards(tmp_path / "shards")))
    config, whole, broken = settings(shards, RUNS[name]), tmp_path / "whole", tmp_path / "broken"
    with alone():
        train(whole, config, shards)
        counted = torch.cuda.max_memory_allocated() if CUDA else None
        train(broken, config, shards, stop=STOP)
        torch.manual_seed(99)  # what the random state is when a new process starts does not matter
        train(broken, config, shards)
    wanted, found = losses(whole), losses(broken)
    assert found == wanted
    assert wanted["train"][STEPS] < wanted["train"][1]
    after, resumed = checkpoint(whole, STEPS), checkpoint(broken, STEPS)
    assert after.keys() == resumed.keys()
    assert all(torch.equal(resumed[key], value) for key, value in after.items())
    records, _ = read(broken / "journal.jsonl")
    assert latest(records, "finished")[STEPS]["resumed_from_step"] == STOP
    records, _ = read(whole / "journal.jsonl")
    [peak] = latest(records, "memory")[STEPS]["peak_memory_bytes"]
    assert peak > 0
    assert counted in (None, peak), "as torch.cuda counts it"


def test_the_copy_from_a_gpu_is_complete_before_the_weights_change(tmp_path: Path) -> None:
    weights = {f"param.{i}": torch.full((1 << 22,), float(i), device=DEVICE) for i in range(20)}
    saver = Checkpointer(tmp_path, 2, "a", 0, 1)
    saver.save(1, "stage-00000-replica-00000.safetensors", weights, {})
    saver.wait_for_copy()
    for weight in weights.values():
        weight.fill_(-1.0)
    saver.wait()
    saved = latest_valid(tmp_path)
    assert saved is not None
    for name, value in saved.tensors("param"):
        assert (value == float(name)).all()
