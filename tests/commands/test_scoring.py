"""A trained model's loss at fewer bits: the one that a plain loop over its held-out samples gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from finhpc.commands.sweep.score import held_out_loss, score_at
from finhpc.data.shards.shards import Shards
from finhpc.errors import ImplausibleError
from finhpc.models.loading import load_model
from finhpc.settings.base import build
from finhpc.settings.pretrain import PretrainConfig
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


@pytest.mark.parametrize(("bits", "scale"), [(8, 300.0), (8, 0.0), (4, 300.0)])
def test_a_loss_that_cannot_be_is_kept_nowhere_and_the_next_start_exports_again(
    tmp_path: Path, run_shards: Path, bits: int, scale: float
) -> None:
    run = run_of(tmp_path, run_shards)
    config = settings(run_shards, "cpu")
    full = held_out_loss(run / "model", config)
    out = run / f"quantized-{bits}bit"
    damaged = load_model(run / "model")
    with torch.no_grad():  # as packed weights read as plain numbers: of another size
        for parameter in damaged.parameters():
            parameter.mul_(scale)
    saved(damaged, out)
    with pytest.raises(ImplausibleError, match=rf"{run.name} at {bits} bits: val_loss=.*16-bit loss"):
        score_at(bits, config, run, full if scale else 1 + full)
    assert not out.exists()
    assert abs(score_at(bits, config, run, full)["val_loss"] - full) < 1
    assert (out / "scores.json").is_file()
