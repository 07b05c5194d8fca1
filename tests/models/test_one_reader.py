"""Models as others write them: every command reads the same weights, or refuses the folder by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from finhpc.errors import CheckpointError, ConfigError
from finhpc.models.files.config import read_config
from tests.models.dense import saved, tiny_gpt2, tiny_llama, tiny_mistral, tiny_qwen2
from tests.models.folders import assert_all_give, assert_all_refuse, logits, model_ways, peft_adapter
from tests.tiny import with_tokenizer

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAKES: dict[str, Callable[[], Any]] = {"gpt2": lambda: tiny_gpt2(layers=2), "llama": lambda: tiny_llama(layers=2)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("models")
    return {name: with_tokenizer(saved(make(), place / name)) for name, make in MAKES.items()}


def renamed(folder: Path, to: Path, new: Callable[[str], str]) -> Path:
    shutil.copytree(folder, to)
    save_file({new(name): tensor for name, tensor in load_file(to / ONE).items()}, to / ONE, {"format": "pt"})
    return to


def bare(name: str) -> str:
    return name.removeprefix("transformer.").removeprefix("model.")


@pytest.mark.parametrize("family", MAKES)
@pytest.mark.parametrize(
    "new",
    [bare, lambda name: f"module.{name}", lambda name: f"_orig_mod.module.{name}", lambda name: f"module.{bare(name)}"],
    ids=["bare", "ddp", "compiled", "bare and ddp"],
)
def test_names_of_the_hub_and_of_wrappers(
    family: str, new: Callable[[str], str], folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = renamed(folders[family], tmp_path / "model", new)
    assert_all_give(model_ways(folder, tmp_path / "out"), logits(MAKES[family]()))


def test_an_index_of_bare_names(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = renamed(folders["llama"], tmp_path / "a model", bare)
    tensors = load_file(folder / ONE)
    (folder / ONE).unlink()
    index = {}
    for i, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2])):
        save_file({name: tensors[name] for name in names}, folder / f"part-{i}.safetensors")
        index |= dict.fromkeys(names, f"part-{i}.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": index}))
    save_file({"tok_embeddings.weight": torch.ones(3)}, folder / "consolidated.safetensors")  # as Mistral's folders
    assert_all_give(model_ways(folder, tmp_path / "out"), logits(MAKES["llama"]()))


def test_an_index_of_a_folder_below(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["llama"], tmp_path / "model"))
    (folder / "below").mkdir()
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(load_file(folder / ONE), f"below/{ONE}")}))
    (folder / ONE).rename(folder / "below" / ONE)
    assert_all_give(model_ways(folder, tmp_path / "out"), logits(MAKES["llama"]()))


def part(folder: Path, index: dict[str, str], **more: Tensor) -> None:
    """The weights in one part under an index."""
    tensors = load_file(folder / ONE) | more
    (folder / ONE).unlink()
    save_file(tensors, folder / "part.safetensors")
    names = dict.fromkeys(load_file(folder / "part.safetensors").keys() - more.keys(), "part.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": names | index}))


def with_tensor(folder: Path, **more: Tensor) -> None:
    save_file(load_file(folder / ONE) | more, folder / ONE, {"format": "pt"})


def with_setting(folder: Path, **settings: Any) -> None:
    tree = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(tree))


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "extra tensor": (lambda f: with_tensor(f, **{"score.weight": torch.ones(2, 32)}), "holds score.weight"),
    "extra head": (lambda f: with_tensor(f, **{"lm_head.weight": torch.ones(300, 32)}), "tie_word_embeddings=true"),
    "biases": (lambda f: with_tensor(f, **{"model.layers.0.mlp.up_proj.bias": torch.ones(48)}), "up_proj.bias"),
    "untied without head": (lambda f: with_setting(f, tie_word_embeddings=False), "has no lm_head.weight"),
    "fp8": (
        lambda f: with_tensor(f, **{"model.norm.weight": torch.ones(32).to(torch.float8_e4m3fn)}),
        "is F8_E4M3, so the model is quantized",
    ),
    "index of more": (lambda f: part(f, {"lm_head.weight": "part.safetensors"}), "names lm_head.weight"),
    "index of less": (lambda f: part(f, {}, **{"score.weight": torch.ones(2)}), "puts nowhere"),
    "one file and index": (
        lambda f: (shutil.copy(f / ONE, f / "old"), part(f, {}), shutil.move(f / "old", f / ONE)),
        "holds both model.safetensors and",
    ),
    "index of numbers": (lambda f: part(f, {"lm_head.weight": 3}), "is cut short or damaged"),  # type: ignore[dict-item]
    "dead link": (
        lambda f: ((f / ONE).unlink(), (f / ONE).symlink_to("gone")),
        "a link to gone, which is not",
    ),
    "generation config": (lambda f: (f / "generation_config.json").write_text("[]"), "is not a JSON object"),
    "ends": (lambda f: (f / "generation_config.json").write_text('{"eos_token_id": "x"}'), "has eos_token_id='x'"),
    "another name": (lambda f: (f / ONE).rename(f / "gptq.safetensors"), "only gptq.safetensors"),
    "pickle": (lambda f: (f / ONE).rename(f / "pytorch_model.bin"), "only pytorch_model.bin; pickled weights"),
    "both names": (
        lambda f: with_tensor(f, **{"module.model.norm.weight": torch.ones(32)}),
        "holds both",
    ),
    "gptq": (lambda f: with_setting(f, quantization_config={"quant_method": "gptq", "bits": 4}), "quant_method=gptq"),
    "multiplier": (lambda f: with_setting(f, embedding_multiplier=12.0), "embedding_multiplier=12.0"),
    "longrope": (lambda f: with_setting(f, rope_scaling={"type": "longrope"}), "rope_scaling of type longrope"),
    "code": (lambda f: with_setting(f, auto_map={"AutoModelForCausalLM": "mine.Mine"}), "code of its own"),
    "both": (lambda f: peft_adapter(f, f, target_modules=["q_proj"], r=2), "is an adapter's folder"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_what_is_not_applied_is_refused_by_every_command(how: str, folders: dict[str, Path], tmp_path: Path) -> None:
    spoil, said = SPOILT[how]
    folder = Path(shutil.copytree(folders["llama"], tmp_path / "model"))
    spoil(folder)
    ways = model_ways(folder, tmp_path / "out")
    if how == "both":  # as an adapter it opens with load_model, evaluate and export
        ways = {name: ways[name] for name in ("generate", "finetune")}
    assert_all_refuse(ways, said, str(folder))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"logits_scaling": 8}, "logits_scaling=8"),
        ({"attention_multiplier": 0.01}, "attention_multiplier=0.01"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters of several kinds"),
        ({"rope_scaling": {"rope_type": "su", "factor": 4}}, "rope_scaling of type su"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "layer_types with chunked_attention"),
        ({"no_rope_layers": [1, 0]}, "no_rope_layers"),
        ({"hidden_act": "mystery"}, "activation mystery"),
        ({"is_causal": False}, "is_causal=False"),
        ({"add_cross_attention": True}, "add_cross_attention=True"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quant_method=fp8"),
        ({"compression_config": {"format": "int-quantized"}}, "compression_config"),
        ({"use_mrope": True}, "use_mrope=True"),
    ],
)
def test_settings_that_no_command_computes(
    settings: dict[str, Any], said: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copy(folders["llama"] / "config.json", tmp_path)
    with_setting(tmp_path, **settings)
    with pytest.raises(ConfigError) as caught:
        read_config(tmp_path)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"hidden_size": "64"}, "hidden_size"),
        ({"vocab_size": None}, "vocab_size"),
        ({"num_attention_heads": 5}, "multiple of the number of attention heads"),
        ({"rope_scaling": "linear"}, "rope_scaling='linear'"),
        ({"rope_parameters": [1]}, "rope_parameters="),
        ({"quantization_config": "int8"}, "quantization_config='int8'"),
        ({"layer_types": "full"}, "layer_types='full'"),
        ({"model_type": "lowrank_llama", "low_rank": "4"}, "low_rank='4'"),
    ],
)
def test_settings_of_the_wrong_kind_are_one_error(
    settings: dict[str, Any], said: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copy(folders["llama"] / "config.json", tmp_path)
    with_setting(tmp_path, **settings)
    with pytest.raises(CheckpointError, match=r"is not a model's config.*; correct it") as caught:
        read_config(tmp_path)
    assert said in str(caught.value)


def test_an_unknown_layout_of_queries_keys_and_values_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    """It would count as joint, and its weights would not fit, or would be read as another model's."""
    shutil.copy(folders["llama"] / "config.json", tmp_path)
    for layout in ("joint", "separate"):
        with_setting(tmp_path, low_rank_qkv=layout)
        read_config(tmp_path)
    with_setting(tmp_path, low_rank_qkv="apart")
    with pytest.raises(CheckpointError, match=r"low_rank_qkv='apart', which is unknown; it must be joint or separate"):
        read_config(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (tiny_llama, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        (tiny_llama, {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}}),
        (tiny_llama, {"logit_scale": 1.0, "rope_interleaved": False, "embedding_multiplier": None, "num_experts": 0}),
        (tiny_gpt2, {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}),
        (tiny_gpt2, {"activation_function": "relu", "n_ctx": 64, "task_specific_params": {"text-generation": {}}}),
        (tiny_qwen2, {"layer_types": ["full_attention"] * 3, "use_mrope": False}),
        (tiny_mistral, {"sliding_window": None}),
    ],
)
def test_settings_that_transformers_computes_are_computed_by_all(
    make: Any, settings: dict[str, Any], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    folder = with_tokenizer(saved(make(), tmp_path / "model"))
    with_setting(folder, **settings)
    wanted = logits(AutoModelForCausalLM.from_pretrained(folder).eval())
    assert_all_give(model_ways(folder, tmp_path / "out"), wanted)


@pytest.mark.parametrize("family", MAKES)
def test_a_base_that_was_trained_with_rounded_weights(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Finetuning reads what every other command computes with, and a decomposition is not rounded a second time."""
    from finhpc.models.families.registry import as_low_rank
    from finhpc.models.files.source import open_weights
    from finhpc.models.loading import load_model
    from finhpc.quantization.fake import TRAINED

    folder = Path(shutil.copytree(folders[family], tmp_path / "model"))
    with_setting(folder, **{TRAINED: {"bits": 4, "scheme": "minmax"}})
    weights, model = open_weights(folder), load_model(folder)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(weights.read(name), tensor, rtol=0, atol=0)
    assert not torch.allclose(logits(model), logits(MAKES[family]()), atol=0.1)
    ways = model_ways(folder, tmp_path / "out")
    assert_all_give(ways, logits(model))
    assert not hasattr(as_low_rank(weights.config, {"mlp": 4}), TRAINED)
    kept = open_weights(folder, floats=True)
    name = next(name for name in model.state_dict() if "mlp" in name and name.endswith("weight"))
    torch.testing.assert_close(kept.read(name), MAKES[family]().state_dict()[name], rtol=0, atol=0)
