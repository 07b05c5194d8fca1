"""The learning rate's schedule and what is decayed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from finhpc.config import Optimizer
from finhpc.lowrank.layers import LowRankEmbedding, LowRankLinear
from finhpc.training.optimizer import decay_products, learning_rate, make_optimizer, set_lr


def test_warm_up_then_cosine_to_the_minimum() -> None:
    settings = Optimizer(lr=1.0, warmup_steps=10, min_lr_ratio=0.1)
    rates = [learning_rate(settings, step, 110) for step in range(1, 111)]
    assert rates[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert rates[59] == pytest.approx(0.55)  # half way down
    assert rates[-1] == pytest.approx(0.1)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert learning_rate(Optimizer(lr=2.0, warmup_steps=0), 1, 1) == pytest.approx(0.2)


def test_norms_and_biases_are_not_decayed() -> None:
    layer = nn.Linear(3, 2)
    optimizer = make_optimizer(dict(layer.named_parameters()), Optimizer(lr=0.1, weight_decay=0.5))
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.bias.fill_(1.0)
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.allclose(layer.weight, torch.full((2, 3), 0.95))
    assert torch.equal(layer.bias, torch.ones(2))


def test_each_factor_has_its_own_learning_rate() -> None:
    layer = LowRankLinear(3, 2, 2, bias=True)
    settings = Optimizer(lr=0.1, weight_decay=0.0, lr_scale_a=0.5, lr_scale_b=4.0)
    optimizer = make_optimizer({f"h.{name}": p for name, p in layer.named_parameters()}, settings)
    before = {name: p.detach().clone().zero_() for name, p in layer.named_parameters()}
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
            parameter.grad = torch.ones_like(parameter)
    set_lr(optimizer, 0.01)
    optimizer.step()  # Adam's first step moves every element by the learning rate
    moved = {name: (before[name] - p).detach() for name, p in layer.named_parameters()}
    for name, rate in {"A": 0.005, "B": 0.04, "bias": 0.01}.items():
        torch.testing.assert_close(moved[name], torch.full_like(moved[name], rate), rtol=1e-4, atol=0)


def test_decay_of_the_product_leaves_the_factors_to_it() -> None:
    layer = LowRankLinear(3, 2, 2, bias=False)
    named = {f"h.{name}": p for name, p in layer.named_parameters()} | {"dense.weight": nn.Parameter(torch.ones(2, 2))}
    optimizer = make_optimizer(named, Optimizer(weight_decay=0.5, decay="product"))
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert [decays[id(p)] for p in named.values()] == [0.0, 0.0, 0.5]


@pytest.mark.parametrize("module", [LowRankLinear(7, 5, 3, bias=False), LowRankEmbedding(7, 5, 3)])
def test_a_product_shrinks_along_its_own_gradient(module: LowRankLinear | LowRankEmbedding) -> None:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    a, b = module.pair()
    (b @ a).square().sum().mul(0.5 * 1e-3).backward()
    expected = {name: (p - p.grad).detach() for name, p in module.named_parameters()}
    decay_products([module.pair()], 1e-3)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name])
