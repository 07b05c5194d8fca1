"""Adapters on disk: opened by peft, by us, merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from finhpc.config.finetune import Lora
from finhpc.errors import CheckpointError, ConfigError
from finhpc.models.adapter import CONFIG, TENSORS, load_adapter, merge_adapter, save_adapter
from finhpc.models.weights import open_weights
from tests.models.dense import logits, saved, tiny_gpt2, tiny_llama
from tests.models.packs import examples, packs_of, plain_loss
from tests.models.test_packed import adapted, loss_of, parameters


def trained(base: Path, lora: Lora, out: Path) -> float:
    """Two steps of training, then the adapter in `out`; the loss after them."""
    adaptation, layers = adapted(base, lora)
    ours, packs = parameters(layers), packs_of(examples(8), 4, 6)
    optimizer = torch.optim.SGD(ours.values(), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(layers, packs).backward()
        optimizer.step()
    save_adapter(out, lora, {name: p.detach() for name, p in ours.items()}, adaptation.weights)
    return float(loss_of(layers, packs))


@pytest.mark.parametrize("init", ["default", "gaussian", "orthogonal", "pissa", "olora"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_peft_opens_it_and_merging_is_the_same(tmp_path: Path, make: Any, init: Any) -> None:
    base = saved(make(), tmp_path / "base")
    loss = trained(base, Lora(rank=4, init=init), tmp_path / "adapter")
    opened = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "adapter")).eval()
    assert abs(plain_loss(opened, examples(8)).item() - loss) <= 1e-5 * loss
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    before = logits(model)
    merge_adapter(model, load_adapter(tmp_path / "adapter", model))
    assert not torch.allclose(logits(model), before, atol=1e-3)
    assert torch.allclose(logits(model), logits(opened), atol=1e-4)


def test_an_adapter_of_another_model_and_damaged_files_are_refused(tmp_path: Path) -> None:
    base = saved(tiny_llama(), tmp_path / "base")
    folder = tmp_path / "adapter"
    trained(base, Lora(rank=4), folder)
    with pytest.raises(ConfigError, match="another model"):
        load_adapter(folder, open_weights(saved(tiny_gpt2(), tmp_path / "other")).skeleton)
    model = open_weights(base).skeleton
    content = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match="cut short or damaged"):
        load_adapter(folder, model)
    (folder / TENSORS).write_bytes(content)
    (folder / CONFIG).write_text("{")
    with pytest.raises(CheckpointError, match="cut short or damaged"):
        load_adapter(folder, model)
    (folder / CONFIG).unlink()
    with pytest.raises(ConfigError, match="no adapter_config"):
        load_adapter(folder, model)
