"""A trained model's loss at fewer bits: the one that a plain loop over its held-out samples gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from finhpc.config import PretrainConfig, build
from finhpc.data.shards import Shards
from finhpc.models.loading import load_model
from finhpc.orchestration.scoring import held_out_loss, score_at
from tests.models.dense import saved, tiny_gpt2


def settings(run_shards: Path, device: str) -> PretrainConfig:
    data = {"shards": str(run_shards), "seq_len": 32, "eval_samples": 7}
    return build(PretrainConfig, {"data": data, "resources": {"device": device}, "parallel": {"micro_batch_size": 3}})


def run_of(folder: Path, shards: Path) -> Path:
    saved(tiny_gpt2(vocab=Shards.open(str(shards)).manifest.vocab_size), folder / "model")
    return folder


@pytest.mark.parametrize("bits", [8, 4])
def test_the_loss_is_that_of_the_quantised_model_sample_by_sample(tmp_path: Path, run_shards: Path, bits: int) -> None:
    run = run_of(tmp_path, run_shards)
    found = score_at(bits, settings(run_shards, "cpu"), run)
    model = load_model(run / f"quantized-{bits}bit")
    samples = torch.from_numpy(Shards.open(str(run_shards)).eval_samples(7, 32))
    with torch.inference_mode():
        losses = [
            float(torch.nn.functional.cross_entropy(model(one[None]).logits[0, :-1].float(), one[1:]))
            for one in samples
        ]
    assert found["val_loss"] == pytest.approx(sum(losses) / 7, rel=1e-5)
    plain = held_out_loss(run / "model", settings(run_shards, "cpu"))
    assert 0 < abs(found["val_loss"] - plain) < 0.1 * plain
    again = score_at(bits, settings(run_shards, "cpu"), run)
    assert again == found, "what is there is kept"


@pytest.mark.gpu
def test_a_gpu_gives_the_cpus_loss(tmp_path: Path, run_shards: Path) -> None:
    run = run_of(tmp_path, run_shards)
    own = score_at(4, settings(run_shards, "cpu"), run)["val_loss"]
    assert held_out_loss(run / "quantized-4bit", settings(run_shards, "auto")) == pytest.approx(own, rel=1e-4)
    assert torch.cuda.max_memory_allocated() > 0
