"""Pretraining with rounded weights: it learns, and what is exported is what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import finhpc
from finhpc.commands.export import export
from finhpc.commands.pretrain import pretrain
from finhpc.data.shards.shards import Shards
from finhpc.errors import ConfigError
from finhpc.settings.base import build
from finhpc.settings.export import ExportConfig
from finhpc.settings.pretrain import PretrainConfig
from finhpc.training.journal import latest, read
from tests.tiny import pretrain_tree

pytestmark = pytest.mark.usefixtures("quick_training")


def config(shards: Path, storage: Path, **quantization: Any) -> PretrainConfig:
    tree = pretrain_tree(
        shards,
        storage,
        model={"layers": 3},
        optimizer={"lr": 3e-3, "warmup_steps": 5},
        parallel={"stages": 2, "micro_batch_size": 4, "micro_batches": 4},
        train={"steps": 60, "eval_every": 0, "checkpoint_every": 0},
        quantization=quantization,
    )
    return build(PretrainConfig, tree)


def test_4_bit_weights_learn_and_are_exported_exactly(run_shards: Path, tmp_path: Path) -> None:
    result = pretrain(config(run_shards, tmp_path, bits=4, when="during"))
    records, _ = read(tmp_path / "run" / "journal.jsonl")
    losses = [r["train_loss"] for r in latest(records, "train").values()]
    assert losses[-1] < losses[0] - 0.5

    held_out = torch.from_numpy(Shards.open(str(run_shards)).eval_samples(16, 32))
    out = str(tmp_path / "out")
    export(build(ExportConfig, {"model": result["model"], "out": out, "quantization": {"bits": 4}}))
    trained, packed = finhpc.load_model(result["model"]), AutoModelForCausalLM.from_pretrained(out)
    plain = AutoModelForCausalLM.from_pretrained(result["model"])  # the weights before rounding
    for model in (trained, packed):
        with torch.no_grad():
            assert model(held_out, labels=held_out).loss.item() == pytest.approx(result["val_loss"], rel=1e-5)
    with torch.no_grad():
        assert plain(held_out, labels=held_out).loss.item() != pytest.approx(result["val_loss"], rel=1e-5)

    with pytest.raises(ConfigError, match=r"quantization\.bits was 4 in the run's config, now 8"):
        pretrain(config(run_shards, tmp_path, bits=8, when="during"))


def test_bits_after_training_are_exports(run_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"quantization\.when=after .* `finhpc export --quantization\.bits 8`"):
        pretrain(config(run_shards, tmp_path, bits=8))
    with pytest.raises(ConfigError, match=r"quantization\.when=during needs quantization\.bits=8 or 4"):
        pretrain(config(run_shards, tmp_path, when="during"))
    with pytest.raises(ConfigError, match=r"quantization\.bits=5 is refused"):
        config(run_shards, tmp_path, bits=5)
    assert not list(tmp_path.iterdir())
