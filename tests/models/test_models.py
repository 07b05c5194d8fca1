"""Shapes, counts, the cut into stages, folders in Hugging Face's layout."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import finhpc
from finhpc.errors import CheckpointError, ConfigError
from finhpc.lowrank.layers import LowRankLinear
from finhpc.models.families.presets import PRESETS
from finhpc.models.families.registry import config_of_method, family_of, parameter_count, resolve_shape, skeleton
from finhpc.models.files import tensor_folder
from finhpc.models.folder import save_model
from finhpc.models.initialize import initial_model
from finhpc.models.loading import load_model
from finhpc.models.pipeline import cut, estimated_cost, estimated_costs, parts_of, stage_borders
from finhpc.settings.pretrain import Method, Model


def config_of(model: dict[str, Any], method: dict[str, Any], vocab: int | None = None) -> Any:
    return config_of_method(resolve_shape(Model(**model), vocab), Method(**method))


# FinGPT-HPC, Table VI (and section IV.C for Llama2-7B); 1.5B by arithmetic, the paper's text differs.
@pytest.mark.parametrize(
    ("preset", "method", "millions", "tolerance"),
    [
        ("gpt2-127m", {"rank": 192}, 77.5, 0.005),
        ("gpt2-127m", {"rank": 96}, 58.5, 0.005),
        ("gpt2-127m", {"rank": 48}, 49.0, 0.005),
        ("gpt2-1.5b", {"kind": "dense"}, 1557.6, 0.001),
        ("gpt2-1.5b", {"rank": 384}, 574.8, 0.001),
        ("gpt2-1.5b", {"rank": 192}, 328.9, 0.001),
        ("gpt2-1.5b", {"rank": 96}, 206.0, 0.001),
        ("llama2-7b", {"kind": "dense"}, 6738.4, 0.001),
        ("llama2-7b", {"rank": 512, "embedding": "low_rank"}, 1320.0, 0.005),
        ("llama2-13b", {"kind": "dense"}, 13015.9, 0.001),
        ("llama2-70b", {"kind": "dense"}, 68976.6, 0.001),
    ],
)
def test_parameter_counts_of_the_paper(preset: str, method: dict[str, Any], millions: float, tolerance: float) -> None:
    assert parameter_count(config_of({"preset": preset}, method)) / 1e6 == pytest.approx(millions, rel=tolerance)


def test_the_fused_attention_is_one_pair_and_the_low_rank_head_untied() -> None:
    model = skeleton(config_of({"preset": "gpt2-tiny"}, {"rank": 8}))
    names = dict(model.named_parameters())
    assert names["transformer.h.0.attn.c_attn.A.weight"].shape == (8, 128)
    assert names["transformer.h.0.attn.c_attn.B.weight"].shape == (384, 8)
    assert names["lm_head.A.weight"].shape == (8, 128)
    assert names["transformer.wte.weight"].shape == (50257, 128)


def test_q_k_and_v_apart_have_the_parameters_of_three_pairs() -> None:
    joint, separate = (config_of({"preset": "gpt2-tiny"}, {"rank": 8, "qkv": qkv}) for qkv in ("joint", "separate"))
    names = dict(skeleton(separate).named_parameters())
    assert names["transformer.h.0.attn.c_attn.A.weight"].shape == (24, 128)
    assert names["transformer.h.0.attn.c_attn.B.weight"].shape == (384, 8)
    blocks = joint.num_hidden_layers
    assert parameter_count(separate) - parameter_count(joint) == blocks * 2 * 8 * 128  # two more A
    with pytest.raises(ConfigError, match=r"method\.rank=129 does not fit transformer\.h\.\*\.attn\.c_attn \(128 x"):
        skeleton(config_of({"preset": "gpt2-tiny"}, {"rank": 8, "ranks": {"qkv": 129}, "qkv": "separate"}))


@pytest.mark.parametrize("preset", ["gpt2-tiny", "llama-tiny"])
def test_a_rank_per_projection_comes_before_its_kind(preset: str) -> None:
    method = {"rank": 8, "ranks": {"qkv": 3, "mlp": 4, "down": 5}}
    model = skeleton(config_of({"preset": preset, "layers": 1}, method))
    ranks = {name.rpartition(".")[2]: m.rank for name, m in model.named_modules() if isinstance(m, LowRankLinear)}
    llama = {"q_proj": 3, "k_proj": 3, "v_proj": 3, "o_proj": 8, "gate_proj": 4, "up_proj": 4, "down_proj": 5}
    of_names = {name: m.rank for name, m in model.named_modules() if isinstance(m, LowRankLinear)}
    if preset == "llama-tiny":
        assert ranks == llama | {"lm_head": 8}
    else:
        block = "transformer.h.0"
        assert of_names == {
            f"{block}.attn.c_attn": 3, f"{block}.attn.c_proj": 8, f"{block}.mlp.c_fc": 4, f"{block}.mlp.c_proj": 5,
            "lm_head": 8,
        }  # fmt: skip


def test_ranks_by_kind_of_layer() -> None:
    method = {"rank": 8, "ranks": {"mlp": 4}, "head": "dense", "embedding": "low_rank"}
    names = dict(skeleton(config_of({"preset": "llama-tiny"}, method)).named_parameters())
    assert names["model.layers.0.mlp.up_proj.A.weight"].shape == (4, 128)
    assert names["model.layers.0.self_attn.k_proj.B.weight"].shape == (64, 8)
    assert names["lm_head.weight"].shape == (32000, 128)
    assert names["model.embed_tokens.A.weight"].shape == (32000, 8)


def test_misfits_are_all_named() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_shape(Model(preset="gpt2-tiny", heads=3, kv_heads=2, vocab_size=10), vocab_size=20)
    assert len(caught.value.problems) == 4
    with pytest.raises(ConfigError, match="did you mean 'gpt2-127m"):
        resolve_shape(Model(preset="gpt2-128m"))


def test_an_unsupported_family_names_the_supported() -> None:
    from transformers import BertConfig

    with pytest.raises(ConfigError, match=r"model_type=bert is not supported; supported: gpt2, llama"):
        family_of(BertConfig())


@pytest.mark.parametrize("preset", ["gpt2-tiny", "llama-tiny"])
@pytest.mark.parametrize("method", [{"kind": "dense"}, {"rank": 4}, {"rank": 4, "embedding": "low_rank"}])
def test_a_pipeline_of_all_parts_computes_transformers_own_loss(preset: str, method: dict[str, Any]) -> None:
    config = config_of({"preset": preset, "layers": 2, "width": 32}, method, vocab=101)
    model = initial_model(config, seed=1, scheme="spectral")
    tokens = torch.randint(0, 101, (2, 16), generator=torch.Generator().manual_seed(0))
    data: Any = tokens
    for part in parts_of(config):
        data = part.run(data, *part.modules(model))
    torch.testing.assert_close(data, model(tokens, labels=tokens).loss)


def test_weights_start_the_same_whatever_is_built_beside_them() -> None:
    small = initial_model(config_of({"preset": "gpt2-tiny", "layers": 1, "width": 32}, {"rank": 4}, 50), 7, "spectral")
    other = initial_model(config_of({"preset": "gpt2-tiny", "layers": 1, "width": 32}, {"rank": 4}, 60), 7, "spectral")
    name = "transformer.h.0.mlp.c_fc.A.weight"
    assert torch.equal(small.get_parameter(name), other.get_parameter(name))
    third = initial_model(config_of({"preset": "gpt2-tiny", "layers": 1, "width": 32}, {"rank": 4}, 50), 8, "spectral")
    assert not torch.equal(small.get_parameter(name), third.get_parameter(name))


def test_a_low_rank_model_starts_from_the_svd_of_its_dense_twin() -> None:
    dense = initial_model(
        config_of({"preset": "gpt2-tiny", "layers": 1, "width": 32}, {"kind": "dense"}, 50), 7, "spectral"
    )
    low = initial_model(config_of({"preset": "gpt2-tiny", "layers": 1, "width": 32}, {"rank": 32}, 50), 7, "spectral")
    name = "transformer.h.0.attn.c_proj"
    product = low.get_parameter(f"{name}.B.weight") @ low.get_parameter(f"{name}.A.weight")
    torch.testing.assert_close(product, dense.get_parameter(f"{name}.weight").T, rtol=1e-4, atol=1e-6)
    assert dense.get_parameter(f"{name}.weight").std().item() == pytest.approx(0.02 / 2**0.5, rel=0.1)


def test_the_cut_is_the_best_of_all() -> None:
    costs = [0.0, 3.0, 1.0, 1.0, 1.0, 9.0]  # embedding, four blocks, head
    borders = cut(costs, starts=[2, 3, 4, 5], stages=2)
    assert borders == [0, 5, 6], "the dear head stands alone"
    assert cut([0.0, 3.0, 1.0, 1.0, 1.0, 1.0], [2, 3, 4, 5], 2) == [0, 2, 6]
    for stages in (1, 3, 4):
        borders = cut(costs, [2, 3, 4, 5], stages)
        assert len(borders) == stages + 1
        assert all(first < last for first, last in pairwise(borders))


@pytest.mark.parametrize("stages", [1, 2, 3, 12])
def test_stages_of_the_whole_model_are_balanced(stages: int) -> None:
    config = config_of({"preset": "gpt2-127m"}, {"rank": 48})
    model, row = skeleton(config), parts_of(config)
    borders = stage_borders(row, estimated_costs(row, model, 256), stages)
    assert borders[0] == 0
    assert borders[-1] == len(row)
    costs = [sum(estimated_cost(part, model, 256) for part in row[a:b]) for a, b in pairwise(borders)]
    assert min(costs) > 0
    # A border can only lie between parts: no stage is further above the mean than the dearest part.
    dearest = max(estimated_cost(part, model, 256) for part in row)
    assert max(costs) < sum(costs) / stages + dearest


@pytest.mark.parametrize("preset", ["gpt2-tiny", "llama-tiny"])
@pytest.mark.parametrize("method", [{"kind": "dense"}, {"rank": 4}])
@pytest.mark.parametrize("files", [1, 2])
def test_a_saved_model_opens_with_the_same_logits(
    preset: str, method: dict[str, Any], files: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of({"preset": preset, "layers": 2, "width": 32}, method, vocab=101)
    model = initial_model(config, seed=1, scheme="spectral").eval()
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    monkeypatch.setattr(tensor_folder, "FILE_BYTES", 1 + sum(value.nbytes for value in weights.values()) // files)
    save_model(tmp_path / "model", config, weights.items(), tokenizer=None)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) == files
    tokens = torch.randint(0, 101, (2, 16), generator=torch.Generator().manual_seed(0))
    opened = finhpc.load_model(tmp_path / "model")
    model.config._attn_implementation = "sdpa"  # as it is opened
    torch.testing.assert_close(opened(tokens).logits, model(tokens).logits, rtol=0, atol=0)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["architectures"] == [type(opened).__name__]
    generated = opened.generate(tokens[:1, :4], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert generated.shape == (1, 8)


def test_a_pickle_named_safetensors_is_refused(tmp_path: Path) -> None:
    config = config_of({"preset": "gpt2-tiny", "layers": 1, "width": 32}, {"kind": "dense"}, vocab=101)
    config.save_pretrained(tmp_path)
    torch.save({"transformer.wte.weight": torch.zeros(101, 32)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="pickles are never opened"):
        finhpc.load_model(tmp_path)


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match="pickled weights are not opened"):
        load_model(tmp_path)


def test_every_preset_fits_together() -> None:
    for name in PRESETS:
        resolve_shape(Model(preset=name))
