"""Llama-like families: what Llama's modules give is what transformers and peft give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from finhpc.commands.export import export
from finhpc.models.families.registry import context_of
from finhpc.models.files.source import open_weights
from finhpc.models.lora.peft_format import save_adapter
from finhpc.settings.export import ExportConfig
from finhpc.settings.finetune import FinetuneQuantization, Lora
from tests.models.dense import logits, saved, tiny_llama, tiny_mistral, tiny_qwen2
from tests.models.packs import examples, packs_of, peft_model, peft_parameters, plain_loss
from tests.models.test_packed import adapted, assert_near, loss_of, parameters

MAKES = [tiny_mistral, tiny_qwen2]


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_finetuning_is_pefts_and_export_merges_it(tmp_path: Path, make: Any, recompute: Any) -> None:
    base, lora = saved(make(), tmp_path / "base"), Lora(rank=4, init="orthogonal")
    lora_model, layers = adapted(base, lora, recompute=recompute)
    ours, some = parameters(layers), examples(8)
    plain = peft_model(base, {name: p.detach() for name, p in ours.items()})
    wanted = plain_loss(plain, some)
    wanted.backward()
    loss = loss_of(layers, packs_of(some, 4, 6))
    loss.backward()
    assert abs(loss.item() - wanted.item()) <= 1e-5 * wanted.item()
    assert_near({n: p.grad for n, p in ours.items()}, {n: p.grad for n, p in peft_parameters(plain).items()})
    save_adapter(tmp_path / "adapter", lora, {name: p.detach() for name, p in ours.items()}, lora_model.weights)
    opened = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "adapter")).eval()
    export(ExportConfig(model=str(tmp_path / "adapter"), format="merged", out=str(tmp_path / "out")))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(merged) is type(make())
    torch.testing.assert_close(logits(merged), logits(opened), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("bits", "scheme"), [(8, "int8"), (4, "minmax")])
def test_a_quantised_base_keeps_its_biases(tmp_path: Path, bits: int, scheme: str) -> None:
    base = saved(tiny_qwen2(), tmp_path / "base")
    lora_model, layers = adapted(base, Lora(rank=4), bits=bits, scheme=scheme)
    quantization = FinetuneQuantization.model_validate({"bits": bits, "scheme": scheme})
    trained = {name: p.detach() for name, p in parameters(layers).items()}
    save_adapter(tmp_path / "adapter", Lora(rank=4), trained, lora_model.weights, quantization)
    export(ExportConfig(model=str(tmp_path / "adapter"), format="merged", out=str(tmp_path / "out"), dtype="float32"))
    merged, packs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval(), packs_of(examples(8), 4, 6)
    assert float(plain_loss(merged, examples(8))) == pytest.approx(float(loss_of(layers, packs)), rel=1e-4)
    with torch.no_grad():
        merged.model.layers[0].self_attn.k_proj.bias.zero_()
        merged.model.layers[0].self_attn.v_proj.bias.zero_()
    assert float(plain_loss(merged, examples(8))) != pytest.approx(float(loss_of(layers, packs)), rel=1e-3)


@pytest.mark.parametrize("make", MAKES)
def test_pretraining_and_packed_exports_compute_the_same(tmp_path: Path, make: Any) -> None:
    from finhpc.models.pipeline import parts_of

    base = saved(make(), tmp_path / "base")
    model: Any = AutoModelForCausalLM.from_pretrained(base).eval()
    tokens = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(2))
    flow: Any = tokens
    with torch.no_grad():
        for part in parts_of(model.config):
            flow = part.run(flow, *part.modules(model))
        torch.testing.assert_close(flow, model(tokens, labels=tokens).loss)
    export(ExportConfig(model=str(base), out=str(tmp_path / "q"), quantization={"bits": 8}))
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "q").eval()
    assert (logits(packed) - logits(model)).norm() < 0.05 * logits(model).norm()


def test_a_sliding_window_is_the_longest_sequence(tmp_path: Path) -> None:
    weights = open_weights(saved(tiny_mistral(window=24), tmp_path))
    assert context_of(weights.config) == 24
    assert context_of(tiny_mistral().config) == 64
    assert context_of(tiny_qwen2().config) == 64
    assert context_of(tiny_llama().config) == 64
    sliding = tiny_qwen2().config.to_dict() | {"use_sliding_window": True, "sliding_window": 16, "layer_types": None}
    assert context_of(type(tiny_qwen2().config)(**sliding | {"max_window_layers": 1})) == 16
    assert context_of(type(tiny_qwen2().config)(**sliding | {"max_window_layers": 3})) == 64, "no layer slides"
