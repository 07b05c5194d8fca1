"""DLR: where the copies of the latent are, and that decay leaves them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from finhpc.lowrank.dlr import dlr, duplicates, keep_residual
from finhpc.lowrank.initialize import cola
from finhpc.lowrank.layers import LowRankLinear
from finhpc.models.families.registry import config_of_method, resolve_shape
from finhpc.models.initialize import initial_model
from finhpc.settings.base import build
from finhpc.settings.pretrain import Method, Model, PretrainConfig


def test_b_starts_with_each_latent_coordinate_copied_to_its_outputs() -> None:
    """K = ceil(7 / 3) = 3: outputs 0 to 2 get coordinate 0, 3 to 5 coordinate 1, the last one coordinate 2."""
    columns, scale = duplicates(7, 3)
    assert columns.tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert scale == pytest.approx(3**-0.5)
    a, b = dlr(torch.empty(7, 4), 3, torch.Generator().manual_seed(1))
    a0, b0 = cola(torch.empty(7, 4), 3, torch.Generator().manual_seed(1))
    assert torch.equal(a, a0)
    z = torch.randn(5, 3)
    expanded = z.repeat_interleave(3, dim=-1)[:, :7]  # the paper's Expand_K
    torch.testing.assert_close(z @ b.T, z @ b0.T + expanded / 3**0.5)


def test_the_head_and_the_embedding_start_as_without_it() -> None:
    shape = resolve_shape(Model(preset="gpt2-tiny", layers=1, width=32), 101)
    config = config_of_method(shape, Method(rank=4, embedding="low_rank", qkv="separate"))
    with_it, plain = initial_model(config, 1, "dlr"), initial_model(config, 1, None)
    for name in ("lm_head.B.weight", "transformer.wte.B.weight"):
        assert torch.equal(with_it.get_parameter(name), plain.get_parameter(name)), name
    layer = with_it.get_submodule("transformer.h.0.attn.c_attn")
    outside = layer.pair()[1].detach().clone()
    for block in outside:  # K = 8 in each of q, k and v
        block[torch.arange(32), torch.arange(32) // 8] -= 8**-0.5
    assert outside.std() == pytest.approx((32 + 32) ** -0.25 * 4**-0.25, rel=0.1)


def test_decay_pulls_b_to_the_copies() -> None:
    layer = LowRankLinear(4, 6, 3, bias=False, blocks=2)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    groups = [{"params": [layer.A.weight], "weight_decay": 0.0}, {"params": [layer.B.weight], "weight_decay": 0.5}]
    optimizer = torch.optim.AdamW(groups, lr=0.2)
    residual = torch.eye(3).repeat(2, 1)  # K = 1 in blocks of 3 outputs at rank 3
    a, expected = layer.A.weight.detach().clone(), layer.B.weight - 0.1 * (layer.B.weight - residual)
    keep_residual({"b": layer}, {"b": layer.B.weight}, optimizer.param_groups)
    optimizer.step()
    torch.testing.assert_close(layer.B.weight.detach(), expected.detach())
    assert torch.equal(layer.A.weight, a)
    keep_residual({"b": layer}, {}, optimizer.param_groups)  # updated by another replica
    torch.testing.assert_close(layer.B.weight.detach(), expected.detach())


def test_a_decay_of_the_product_is_refused() -> None:
    tree = {"method": {"init": "dlr"}, "optimizer": {"decay": "product"}}
    (problem,) = build(PretrainConfig, tree).problems()
    assert problem.startswith(
        "optimizer.decay=product would shrink the copies of the latent that method.init=dlr keeps"
    )
