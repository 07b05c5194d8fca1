"""Adapters on disk: opened by peft, by us, merged."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from finhpc.commands.export import export
from finhpc.errors import CheckpointError, ConfigError
from finhpc.models.files.manifest import weights_fingerprint
from finhpc.models.files.source import open_weights
from finhpc.models.loading import load_model
from finhpc.models.lora.adapter_file import load_adapter
from finhpc.models.lora.peft_format import CONFIG, FINGERPRINT, TENSORS, merge_adapter, save_adapter
from finhpc.quantization.fake import TRAINED
from finhpc.settings.export import ExportConfig
from finhpc.settings.finetune import FinetuneQuantization, Lora
from tests.models.dense import logits, saved, tiny_gpt2, tiny_llama
from tests.models.packs import examples, packs_of, plain_loss
from tests.models.test_packed import LORA, adapted, loss_of, parameters
from tests.tiny import word_tokenizer


def trained(base: Path, lora: Lora, out: Path) -> float:
    """Two steps of training, then the adapter in `out`; the loss after them."""
    lora_model, layers = adapted(base, lora)
    ours, packs = parameters(layers), packs_of(examples(8), 4, 6)
    optimizer = torch.optim.SGD(ours.values(), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(layers, packs).backward()
        optimizer.step()
    save_adapter(out, lora, {name: p.detach() for name, p in ours.items()}, lora_model.weights)
    return float(loss_of(layers, packs))


@pytest.mark.parametrize(
    ("make", "lora"),
    [
        *((tiny_llama, {"init": init}) for init in ("default", "gaussian", "orthogonal", "pissa", "olora")),
        *((tiny_gpt2, {"init": init}) for init in ("default", "pissa", "olora")),  # these read its turned matrices
        (tiny_llama, {"rslora": True, "lora_alpha": 3.0}),
        (tiny_llama, {"rslora": True, "init": "pissa"}),
        (tiny_llama, {"dora": True}),
        (tiny_gpt2, {"dora": True, "rslora": True, "init": "olora"}),
    ],
)
def test_peft_opens_it_and_merging_is_the_same(tmp_path: Path, make: Any, lora: dict[str, Any]) -> None:
    base = saved(make(), tmp_path / "base")
    loss = trained(base, Lora.model_validate({"rank": 4} | lora), tmp_path / "adapter")
    opened = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "adapter")).eval()
    assert abs(plain_loss(opened, examples(8)).item() - loss) <= 1e-5 * loss
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    before = logits(model)
    merge_adapter(model, load_adapter(tmp_path / "adapter", model))
    assert not torch.allclose(logits(model), before, atol=1e-3)
    assert torch.allclose(logits(model), logits(opened), atol=1e-4)


@pytest.mark.parametrize(
    ("lora", "how"),
    [({}, {}), ({"dora": True, "rslora": True}, {}), ({}, {"bits": 4, "scheme": "nf4"}), ({"init": "pissa"}, {})],
)
def test_training_continues_from_an_adapter(tmp_path: Path, lora: dict[str, Any], how: dict[str, Any]) -> None:
    base, adapter = saved(tiny_llama(), tmp_path / "base"), tmp_path / "adapter"
    settings = Lora.model_validate({"rank": 4} | lora)
    lora_model, layers = adapted(base, settings, **how)
    ours, packs = parameters(layers), packs_of(examples(8), 4, 6)
    with torch.no_grad():
        for parameter in ours.values():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.1)
    values = {name: p.detach() for name, p in ours.items()}
    save_adapter(adapter, settings, values, lora_model.weights, lora_model.quantization, "0" * 64)
    rest = {"init": "default", "rank": 8, "lora_alpha": 32.0} if "init" in lora else {}  # written as a difference
    again = Lora.model_validate({"rank": 4, "path": str(adapter)} | lora | rest)
    more = adapted(base, again, **how)[1]
    assert float(loss_of(more, packs)) == pytest.approx(float(loss_of(layers, packs)), rel=1e-5)
    if not rest:
        assert all(torch.equal(parameter, ours[name]) for name, parameter in parameters(more).items())
    with torch.no_grad():
        next(iter(parameters(more).values())).add_(1)
    assert not torch.equal(loss_of(adapted(base, again, **how)[1], packs), loss_of(more, packs))


@pytest.mark.parametrize(
    ("settings", "bits", "said"),
    [
        ({"rank": 2}, 16, "its rank is 4, so use lora.rank=4"),
        ({"lora_alpha": 8.0}, 16, "it is scaled by 4, not 2, so use lora.lora_alpha=16 or lora.rslora=true"),
        ({"targets": ["q_proj"]}, 16, "it adds model.layers.0.mlp.down_proj (18)"),
        ({"dora": True}, 16, "it has no DoRA magnitudes, so use lora.dora=false"),
        ({}, 8, "its base had 16 bits, so use quantization.bits=16"),
        ({"init": "gaussian"}, 16, "lora.init=gaussian is for new adapters"),
    ],
)
def test_an_adapter_of_other_settings_is_no_start(
    tmp_path: Path, settings: dict[str, Any], bits: int, said: str
) -> None:
    base, adapter = saved(tiny_llama(), tmp_path / "base"), tmp_path / "adapter"
    lora_model, layers = adapted(base, Lora(rank=4))
    values = {name: p.detach() for name, p in parameters(layers).items()}
    save_adapter(adapter, Lora(rank=4), values, lora_model.weights, fingerprint="0" * 64)
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        adapted(base, Lora.model_validate({"rank": 4, "path": str(adapter)} | settings), bits=bits)
    assert str(caught.value).startswith(f"lora.path={adapter} does not fit the settings: ")
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    ("targets", "written"),
    [
        (r".*layers\.[02]\..*(q|v)_proj", r".*layers\.[02]\..*(q|v)_proj"),
        ([r".*\.1\..*_proj"], r".*\.1\..*_proj"),
        (["o_proj", r".*\.1\.mlp\..*"], None),
    ],
)
def test_regular_expressions_choose_what_peft_chooses(tmp_path: Path, targets: Any, written: Any) -> None:
    from peft import LoraConfig, get_peft_model

    base = saved(tiny_llama(), tmp_path / "base")
    lora = Lora.model_validate({"rank": 4, "init": "gaussian", "targets": targets})
    loss = trained(base, lora, tmp_path / "adapter")
    model = AutoModelForCausalLM.from_pretrained(base)
    opened = PeftModel.from_pretrained(model, str(tmp_path / "adapter")).eval()
    assert abs(plain_loss(opened, examples(8)).item() - loss) <= 1e-5 * loss
    names = {name for name, _ in open_names(opened)}
    if written is None:
        assert {name.rpartition(".")[2] for name in names} == {"o_proj", "gate_proj", "up_proj", "down_proj"}
        assert len(names) == 3 + 3
        return
    assert opened.peft_config["default"].target_modules == written
    fresh = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules=written))
    assert names == {name for name, _ in open_names(fresh)}


def test_another_model_of_the_same_shape_is_no_base(tmp_path: Path) -> None:
    from finhpc.evaluation.models import subjects
    from finhpc.generation.adapters import read_adapters

    base, adapter = saved(tiny_llama(), tmp_path / "base"), tmp_path / "adapter"
    lora, weights = Lora(rank=4), open_weights(base)
    _, layers = adapted(base, lora)
    tensors = {name: p.detach() for name, p in parameters(layers).items()}
    save_adapter(adapter, lora, tensors, weights, fingerprint=weights_fingerprint(base))
    changed = tiny_llama()
    with torch.no_grad():
        changed.model.norm.weight.mul_(1.01)
    other = saved(changed, tmp_path / "other")
    base_rows = weights.config.vocab_size
    for folder in (base, other):
        word_tokenizer(folder, base_rows)
    config = weights.config
    export(ExportConfig(model=str(base), out=str(tmp_path / "q"), quantization={"bits": 8}))
    for fits in (base, tmp_path / "q"):
        assert subjects([str(fits)], [str(adapter)])[0].adapter == str(adapter)
        assert list(read_adapters([str(adapter)], config, fits)) == ["adapter"]
    named = re.escape(f"adapter={adapter} was trained with {base} (sha256 ") + ".*" + re.escape(f"model={other} (")
    with pytest.raises(ConfigError, match=named):
        subjects([str(other)], [str(adapter)])
    with pytest.raises(ConfigError, match=named):
        read_adapters([str(adapter)], config, other)
    load_model(adapter)
    tree = json.loads((adapter / CONFIG).read_text()) | {"base_model_name_or_path": str(other)}
    (adapter / CONFIG).write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match=named):
        load_model(adapter)
    with pytest.raises(ConfigError, match=named):
        export(ExportConfig(model=str(adapter), format="merged", out=str(tmp_path / "out")))
    (adapter / FINGERPRINT).unlink()
    load_model(adapter)


def open_names(model: Any) -> Any:
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "lora_A")]


@pytest.mark.parametrize(("bits", "scheme"), [(16, "auto"), (4, "nf4"), (8, "minmax")])
def test_export_merges_it_onto_the_base_it_was_trained_beside(tmp_path: Path, bits: Any, scheme: Any) -> None:
    base = saved(tiny_llama(), tmp_path / "base")
    quantization = FinetuneQuantization(bits=bits, scheme=scheme)
    lora_model, layers = adapted(base, Lora(rank=4), bits=bits, scheme=scheme)
    ours, packs = parameters(layers), packs_of(examples(8), 4, 6)
    with torch.no_grad():
        for parameter in ours.values():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.1)
    trained = {name: p.detach() for name, p in ours.items()}
    save_adapter(tmp_path / "adapter", Lora(rank=4), trained, lora_model.weights, quantization)
    export(ExportConfig(model=str(tmp_path / "adapter"), format="merged", out=str(tmp_path / "out"), dtype="float32"))
    merged, opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval(), load_model(tmp_path / "adapter")
    assert float(plain_loss(merged, examples(8))) == pytest.approx(float(loss_of(layers, packs)), rel=1e-4)
    assert torch.allclose(logits(merged), logits(opened), atol=1e-5)


@pytest.mark.parametrize("bits", [8, 4])
def test_an_adapter_is_added_to_the_rounded_weights_of_its_base_before_an_export_rounds_the_sum(
    tmp_path: Path, bits: Any
) -> None:
    base = saved(tiny_llama(), tmp_path / "base")
    config = base / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {TRAINED: {"bits": bits, "scheme": "minmax"}}))
    lora_model, layers = adapted(base, LORA)
    draw = torch.Generator().manual_seed(3)
    trained = {name: p.detach() + 0.1 * torch.randn(p.shape, generator=draw) for name, p in parameters(layers).items()}
    save_adapter(tmp_path / "adapter", LORA, trained, lora_model.weights)
    load_model(tmp_path / "adapter").save_pretrained(tmp_path / "sum")
    tree = {"dtype": "float32", "quantization": {"bits": bits}}
    for source, out in (("adapter", "out"), ("sum", "wanted")):
        export(ExportConfig.model_validate(tree | {"model": str(tmp_path / source), "out": str(tmp_path / out)}))
    torch.testing.assert_close(logits(load_model(tmp_path / "out")), logits(load_model(tmp_path / "wanted")))


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
