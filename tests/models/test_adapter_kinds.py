"""Adapters as peft and others write them: every command applies the same of them, or refuses them by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from finhpc.errors import CheckpointError, ConfigError
from finhpc.generation.generator import Generator
from finhpc.models.families.registry import skeleton
from finhpc.models.files.source import config_of
from finhpc.models.loading import load_model
from finhpc.models.lora.adapter_file import base_of, check_base, load_adapter
from finhpc.models.lora.peft_format import CONFIG, TENSORS
from finhpc.settings.base import build
from finhpc.settings.generate import GenerateConfig
from tests.models.dense import saved, tiny_gpt2, tiny_llama
from tests.models.folders import TOKENS, adapter_ways, assert_all_give, assert_all_refuse, by_peft, logits, peft_adapter
from tests.tiny import with_tokenizer


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_tokenizer(saved(tiny_llama(tied=False, layers=2), tmp_path_factory.mktemp("llama") / "base"))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_tokenizer(saved(tiny_gpt2(layers=2), tmp_path_factory.mktemp("gpt2") / "base"))


APPLIED: dict[str, dict[str, Any]] = {
    "rslora": {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "lora_alpha": 3},
    "patterns": {
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, "up_proj": 3},
        "alpha_pattern": {r".*\.0\..*": 5},
    },
    "layers": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    "all but some": {"target_modules": "all-linear", "exclude_modules": ["o_proj"]},
    "head": {"target_modules": ["lm_head", "k_proj"], "embeddings": False},
    "dora": {"target_modules": ["q_proj", "lm_head"], "use_dora": True, "use_rslora": True, "embeddings": False},
}


@pytest.mark.parametrize("kind", APPLIED)
def test_what_peft_applies_every_command_applies(kind: str, llama: Path, tmp_path: Path) -> None:
    adapter = peft_adapter(llama, tmp_path / "adapter", **APPLIED[kind])
    assert_all_give(adapter_ways(llama, adapter, tmp_path / "out"), by_peft(llama, adapter))


def test_rows_of_a_batch_have_adapters_of_their_own_kind(gpt2: Path, tmp_path: Path) -> None:
    kinds = {"dora": {"use_dora": True}, "lora": {"use_rslora": True, "r": 2}}
    folders = {
        name: peft_adapter(gpt2, tmp_path / name, target_modules=["c_attn", f"mlp.{layer}"], **how)
        for (name, how), layer in zip(kinds.items(), ("c_fc", "c_proj"), strict=True)
    }
    tree = {"model": str(gpt2), "prompt": "a", "dtype": "float32", "sampling": {"max_new_tokens": 4}}
    tree |= {"adapters": [str(folder) for folder in folders.values()]}
    made = Generator(build(GenerateConfig, tree))
    wanted = {name: by_peft(gpt2, folder) for name, folder in folders.items()}
    wanted[None] = logits(AutoModelForCausalLM.from_pretrained(gpt2))
    for rows in (["dora", "lora"], [None, "dora"], ["lora", None], ["dora", "dora"], [None, None]):
        made.adapters.select(rows, [TOKENS.shape[1]] * len(rows))
        found = logits(made.model)
        for i, name in enumerate(rows):
            assert (found[i] - wanted[name][i]).abs().max() <= 2e-5 * wanted[name].abs().max(), rows


def test_dora_on_a_low_rank_base_is_refused(tmp_path: Path) -> None:
    from tests.generation.folders import tiny_adapter, tiny_folder, tiny_model

    base, model = tiny_folder(tmp_path / "base", "llama", "low_rank"), tiny_model("llama", "low_rank")
    adapter = tiny_adapter(tmp_path / "adapter", model, ["model.layers.0.self_attn.q_proj"], 4, seed=0, base=base)
    magnitude = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"
    changed(adapter, {"use_dora": True}, **{magnitude: torch.ones(64)})
    assert_all_refuse(adapter_ways(base, adapter, tmp_path / "out"), "use_dora=true", "are low-rank in the base")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, "LoRA of an embedding"),
    "bias": ({"target_modules": ["q_proj"], "bias": "lora_only"}, 'bias="lora_only"'),
    "bias of B": ({"target_modules": ["q_proj"], "lora_bias": True}, "lora_bias=true"),
    "whole layers": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, 'modules_to_save=["lm_head"]'),
    "tokens": ({"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]}, "trainable_token_indices=[1, 2]"),
    "copy of the head": ({"target_modules": ["q_proj", "lm_head"]}, "lm_head.base_layer.weight"),
    "pissa": ({"target_modules": ["q_proj"], "init_lora_weights": "pissa"}, "init_lora_weights=pissa"),
    "olora": ({"target_modules": ["q_proj"], "init_lora_weights": "olora"}, "init_lora_weights=olora"),
    "invocation": ({"target_modules": ["q_proj"], "alora_invocation_tokens": [3]}, "alora_invocation_tokens=[3]"),
}


MORE = ("bias of B", "tokens", "olora", "invocation", "copy of the head")  # of the same ways as the others


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow) if k in MORE else k for k in REFUSED])
def test_what_is_not_applied_every_command_refuses_by_name(kind: str, llama: Path, tmp_path: Path) -> None:
    settings, said = REFUSED[kind]
    adapter = peft_adapter(llama, tmp_path / "adapter", **settings)
    assert_all_refuse(adapter_ways(llama, adapter, tmp_path / "out"), str(adapter), said, "merge it into its base")
    assert not (tmp_path / "out").exists()


def changed(adapter: Path, settings: dict[str, Any] | None = None, **tensors: torch.Tensor | None) -> Path:
    """The adapter's folder with other settings and tensors; None removes one."""
    tree = json.loads((adapter / CONFIG).read_text()) | (settings or {})
    (adapter / CONFIG).write_text(json.dumps(tree))
    held = load_file(adapter / TENSORS) | tensors
    save_file({name: tensor for name, tensor in held.items() if tensor is not None}, adapter / TENSORS)
    return adapter


FIRST = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("settings", "tensors", "said"),
    [
        ({"peft_type": "VERA"}, {}, "peft_type=VERA"),
        ({"use_new_trick": {"gamma": 2}}, {}, 'use_new_trick={"gamma": 2}'),
        ({"target_parameters": ["mlp.experts.gate"]}, {}, "target_parameters"),
        ({"layer_replication": [[0, 2], [1, 2]]}, {}, "layer_replication"),
        ({}, {f"{FIRST}.base_layer.bias": torch.zeros(32)}, "biases of the base"),
        ({}, {f"{FIRST}.lora_magnitude_vector": torch.ones(32)}, "DoRA's magnitudes"),
        ({}, {"base_model.model.lm_head.weight": torch.ones(300, 32)}, "whole layers in place of the base's"),
        ({}, {"model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(4, 32)}, "other names than peft's"),
        ({}, {f"{FIRST}.lora_A.default.weight": torch.ones(4, 32)}, "other names than peft's"),
        ({}, {f"{FIRST}.lora_A.weight": None, f"{FIRST}.lora_B.weight": None}, "names layers without tensors"),
        ({"layers_to_transform": [1]}, {}, "does not choose layers whose tensors are there"),
        ({"r": 8}, {}, "has rank 4, and adapter_config.json says 8"),
        ({"use_dora": True}, {}, "has use_dora and no magnitudes of model.layers.0.self_attn.q_proj"),
        (
            {"use_dora": True},
            {f"{FIRST}.lora_magnitude_vector": torch.ones(3)},
            "has 3 magnitudes, in the base 32 rows",
        ),
        ({}, {f"{FIRST}.lora_A.weight": torch.ones(32), f"{FIRST}.lora_B.weight": torch.ones(32)}, "another model"),
    ],
)
def test_settings_and_tensors_without_effect_are_refused(
    settings: dict[str, Any], tensors: dict[str, torch.Tensor | None], said: str, llama: Path, tmp_path: Path
) -> None:
    adapter = changed(peft_adapter(llama, tmp_path / "adapter", target_modules=["q_proj"]), settings, **tensors)
    with pytest.raises(ConfigError) as caught:
        load_adapter(adapter, skeleton(config_of(llama)))
    assert said in str(caught.value)
    assert str(adapter) in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"r": "four"}, "r=four"),
        ({"r": 0}, "r=0"),
        ({"lora_alpha": None}, "lora_alpha=None"),
        ({"rank_pattern": {"q_proj": -1}}, "q_proj=-1"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern="),
        ({"alpha_pattern": {"(": 2}}, "alpha_pattern="),
        ({"target_modules": 3}, "target_modules=3"),
        ({"target_modules": "*q_proj"}, "target_modules="),
        ({"layers_to_transform": "1"}, "layers_to_transform="),
    ],
)
def test_settings_of_the_wrong_kind_are_damage(
    settings: dict[str, Any], said: str, llama: Path, tmp_path: Path
) -> None:
    adapter = changed(peft_adapter(llama, tmp_path / "adapter", target_modules=["q_proj"]), settings)
    with pytest.raises(CheckpointError, match=said):
        load_adapter(adapter, skeleton(config_of(llama)))


def test_an_adapter_of_a_tied_head_is_refused(gpt2: Path, tmp_path: Path) -> None:
    adapter = peft_adapter(gpt2, tmp_path / "adapter", target_modules=["lm_head", "c_attn"])
    assert_all_refuse(adapter_ways(gpt2, adapter, tmp_path / "out"), "adapts lm_head, which is the embedding")


def test_bases_are_found_by_relative_paths_and_missed_ones_named(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = peft_adapter(llama, tmp_path / "a dapter", target_modules=["q_proj"])
    (tmp_path / "the base").symlink_to(llama)
    monkeypatch.chdir(tmp_path)
    changed(adapter, {"base_model_name_or_path": "./the base"})
    assert base_of(adapter) == tmp_path / "the base"
    assert_all_give(adapter_ways(Path("the base"), adapter, tmp_path / "out"), by_peft(llama, adapter))
    for named, said in (("./moved", str(tmp_path / "moved")), ("", "does not name its base"), (None, "does not name")):
        changed(adapter, {"base_model_name_or_path": named})
        ways = adapter_ways(llama, adapter, tmp_path / "out2")
        assert_all_refuse({name: ways[name] for name in ("load_model", "evaluate the adapter", "export")}, said)


def test_a_quantized_base_takes_adapters_beside_it(llama: Path, tmp_path: Path) -> None:
    from finhpc.commands.export import export
    from finhpc.models.lora.peft_format import QUANTIZED
    from finhpc.settings.export import ExportConfig

    export(
        ExportConfig(
            model=str(llama), out=str(tmp_path / "q"), quantization={"bits": 8, "scheme": "int8"}, dtype="float32"
        )
    )
    adapter = peft_adapter(llama, tmp_path / "adapter", target_modules=["q_proj"])
    changed(adapter, {"base_model_name_or_path": str(tmp_path / "q")})
    (adapter / QUANTIZED).write_text('{"bits": 8, "scheme": "int8"}')
    ways = adapter_ways(tmp_path / "q", adapter, tmp_path / "out")
    assert_all_refuse({"export": ways.pop("export")}, "is quantized already")
    ways.pop("generate")  # puts faster forms of bitsandbytes' layers in their place
    assert_all_give(ways, by_peft(llama, adapter), tolerance=0.1)


@pytest.mark.parametrize("kind", ["dense", "low_rank"])
def test_a_base_is_rounded_as_in_training_by_every_command(kind: str, llama: Path, tmp_path: Path) -> None:
    from finhpc.models.lora.peft_format import QUANTIZED
    from tests.generation.folders import tiny_adapter, tiny_folder, tiny_model

    base = tiny_folder(tmp_path / "base", "llama", kind)
    layers = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    adapter = tiny_adapter(tmp_path / "adapter", tiny_model("llama", kind), layers, 4, seed=0)
    changed(adapter, {"base_model_name_or_path": str(base)})
    plain = adapter_ways(base, adapter, tmp_path / "plain")["evaluate"]()
    (adapter / QUANTIZED).write_text('{"bits": 4, "scheme": "nf4"}')
    ways = adapter_ways(base, adapter, tmp_path / "out")
    wanted = ways["export"]()
    assert not torch.allclose(plain, wanted, atol=1e-2)
    del ways["export"]
    assert_all_give(ways, wanted, tolerance=1e-3)


def test_a_base_that_is_an_adapter_itself_is_refused(llama: Path, tmp_path: Path) -> None:
    adapter = peft_adapter(llama, tmp_path / "adapter", target_modules=["q_proj"])
    shutil.copytree(llama, adapter, dirs_exist_ok=True)  # model and adapter saved into one folder
    changed(adapter, {"base_model_name_or_path": str(adapter)})
    for way in (base_of, load_model):
        with pytest.raises(ConfigError, match="is an adapter's folder itself"):
            way(adapter)


def test_a_token_that_only_pads_makes_no_other_tokenizer(llama: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    adapter = peft_adapter(llama, tmp_path / "adapter", target_modules=["q_proj"])
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(adapter)
    assert_all_give(adapter_ways(llama, adapter, tmp_path / "out"), by_peft(llama, adapter))


def test_a_tokenizer_with_other_ids_is_refused(llama: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    adapter = peft_adapter(llama, tmp_path / "adapter", target_modules=["q_proj"])
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.save_pretrained(adapter)  # the same ids, written anew
    check_base(adapter, llama)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.save_pretrained(adapter)
    assert_all_refuse(
        adapter_ways(llama, adapter, tmp_path / "out"), "'<|im_end|>'", "brings a tokenizer with other ids"
    )
