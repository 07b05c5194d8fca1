"""The nonlinear variant, and that every way to be low-rank reaches models, folders and settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import finhpc
from finhpc.errors import ConfigError
from finhpc.lowrank.cola import ColaLinear
from finhpc.lowrank.layers import LowRankLinear
from finhpc.lowrank.registry import LAYERS
from finhpc.lowrank.replace import ranks_of
from finhpc.models.families.registry import config_of_method, resolve_shape
from finhpc.models.folder import save_model
from finhpc.models.initialize import initial_model
from finhpc.settings.pretrain import Method, Model


def test_the_narrow_activations_pass_through_silu() -> None:
    torch.manual_seed(0)
    layer = ColaLinear(6, 5, 2, bias=True)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(3, 4, 6)
    narrow = x @ layer.A.weight.T
    torch.testing.assert_close(layer(x), (narrow * torch.sigmoid(narrow)) @ layer.B.weight.T + layer.B.bias)
    assert not layer.mergeable


METHODS: dict[str, dict[str, Any]] = {
    "cola": {"kind": "cola"},
    "half": {"kind": "half", "rank": 5},
    "separate": {"qkv": "separate"},
    "separate cola": {"kind": "cola", "qkv": "separate"},
    "sltrain": {"kind": "sltrain", "qkv": "separate"},
    "dlr": {"kind": "cola", "init": "dlr", "qkv": "separate"},
    "ranks of projections": {"ranks": {"qkv": 3, "down": 6, "head": 5}},
}


@pytest.mark.parametrize("preset", ["gpt2-tiny", "llama-tiny"])
@pytest.mark.parametrize("name", METHODS)
def test_a_model_of_it_is_saved_and_opened_with_its_structure(preset: str, name: str, tmp_path: Path) -> None:
    method = Method(**{"rank": 4, **METHODS[name]})
    shape = resolve_shape(Model(preset=preset, layers=2, width=32), 101)
    config = config_of_method(shape, method)
    model = initial_model(config, seed=1, scheme=method.init).eval()
    kinds = {name: type(module) for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    assert kinds.pop("lm_head") is LowRankLinear, "the output layer stays a linear pair"
    assert set(kinds.values()) == {LAYERS[method.kind]}

    weights = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    save_model(tmp_path / "model", config, weights.items(), tokenizer=None)
    opened = finhpc.load_model(tmp_path / "model")
    tokens = torch.randint(0, 101, (2, 16), generator=torch.Generator().manual_seed(0))
    model.config._attn_implementation = "sdpa"
    torch.testing.assert_close(opened(tokens).logits, model(tokens).logits, rtol=0, atol=0)


def test_it_starts_as_its_authors_say_unless_told_otherwise() -> None:
    method = Method(kind="cola", rank=16)
    shape = resolve_shape(Model(preset="gpt2-tiny", layers=1, width=256), 101)
    config = config_of_method(shape, method)
    name = "transformer.h.0.mlp.c_fc.A.weight"
    std = initial_model(config, 1, method.init).get_parameter(name).std().item()
    assert std == pytest.approx((256 + 1024) ** -0.25 * 16**-0.25, rel=0.05)
    spectral = initial_model(config, 1, "spectral").get_parameter(name).std().item()
    assert spectral < 0.8 * std


def test_a_kind_that_is_not_registered_is_refused_and_the_nearest_named() -> None:
    with pytest.raises(ConfigError, match=r"method\.kind=colla is unknown; did you mean 'cola"):
        ranks_of(Method(kind="colla"))


def test_every_registered_layer_takes_the_place_of_a_linear_one() -> None:
    x = torch.randn(3, 6)
    for kind, layer in LAYERS.items():
        made = layer(6, 5, 2, bias=False)
        for parameter in made.parameters():
            nn.init.normal_(parameter)
        assert made(x).shape == F.linear(x, torch.zeros(5, 6)).shape, kind
