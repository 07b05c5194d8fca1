"""The learning rate's schedule and what is decayed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from finhpc.lowrank.layers import LowRankEmbedding, LowRankLinear
from finhpc.settings.training import Optimizer
from finhpc.training.optimizer import (
    decay_products,
    drop_parameters,
    init_state,
    learning_rate,
    make_optimizer,
    moments,
    set_lr,
)


def test_warm_up_then_cosine_to_the_minimum() -> None:
    settings = Optimizer(lr=1.0, warmup_steps=10, min_lr_ratio=0.1)
    rates = [learning_rate(settings, step, 110) for step in range(1, 111)]
    assert rates[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert rates[59] == pytest.approx(0.55)  # half way down
    assert rates[-1] == pytest.approx(0.1)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert learning_rate(Optimizer(lr=2.0, warmup_steps=0), 1, 1) == pytest.approx(0.2)


@pytest.mark.parametrize("steps", [1, 2, 3, 6, 19, 20, 39, 40, 100])
def test_every_training_reaches_its_peak_and_leaves_it(steps: int) -> None:
    settings = Optimizer(lr=1.0, warmup_steps=20, min_lr_ratio=0.1)
    rates = [learning_rate(settings, step, steps) for step in range(1, steps + 1)]
    assert max(rates) == 1.0
    assert rates.index(1.0) + 1 == settings.warmup(steps) <= max(1, steps // 2)
    assert steps == 1 or rates[-1] == pytest.approx(0.1)
    said = settings.shortened(steps)
    assert (said is None) == (steps >= 40)
    assert said is None or f"train.steps={steps}" in said


def test_a_training_made_longer_warms_up_as_long_as_was_asked() -> None:
    settings = Optimizer(lr=1.0, warmup_steps=20)
    assert [settings.warmup(steps) for steps in (6, 30, 60)] == [3, 15, 20]
    assert settings.shortened(60) is None
    assert Optimizer(warmup_steps=0).shortened(1) is None


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
    for name, rate in {"A.weight": 0.005, "B.weight": 0.04, "B.bias": 0.01}.items():
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


def stepped(optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in named.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def two_sizes() -> dict[str, nn.Parameter]:
    """One parameter below bitsandbytes' threshold of 4,096, one above it."""
    torch.manual_seed(0)
    return {"small.weight": nn.Parameter(torch.randn(10, 4)), "large.weight": nn.Parameter(torch.randn(80, 64))}


def test_moments_of_8_bits_follow_those_of_32() -> None:
    moved = {}
    for name in ("adamw", "adamw8bit"):
        named = two_sizes()
        before = {key: p.detach().clone() for key, p in named.items()}
        optimizer = make_optimizer(named, Optimizer.model_validate({"name": name, "lr": 1e-2}))
        for step in range(20):
            stepped(optimizer, named, step)
        moved[name] = {key: (p - before[key]).detach() for key, p in named.items()}
        if name == "adamw8bit":
            kept = {key: moments(optimizer, p) for key, p in named.items()}
    assert kept["small.weight"].keys() == {"state1", "state2"}
    assert kept["small.weight"]["state1"].dtype == torch.float32
    assert kept["large.weight"]["state1"].dtype == torch.uint8
    for key, exact in moved["adamw"].items():
        difference = float((moved["adamw8bit"][key] - exact).norm() / exact.norm())
        assert difference < (1e-5 if key == "small.weight" else 0.1), key


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_moments_put_back_go_on_bit_equal(name: str) -> None:
    settings = Optimizer.model_validate({"name": name, "lr": 1e-2})
    whole = two_sizes()
    optimizer = make_optimizer(whole, settings)
    for step in range(3):
        stepped(optimizer, whole, step)
    held = {key: {n: value.clone() for n, value in moments(optimizer, p).items()} for key, p in whole.items()}
    again = {key: nn.Parameter(p.detach().clone()) for key, p in whole.items()}
    other = make_optimizer(again, settings)
    init_state(other, 3)
    for key, parameter in again.items():
        targets = moments(other, parameter)
        assert targets.keys() == held[key].keys()
        for kept, value in held[key].items():
            targets[kept].copy_(value)
    for step in range(3, 6):
        stepped(optimizer, whole, step)
        stepped(other, again, step)
    assert all(torch.equal(again[key], p) for key, p in whole.items())


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_what_is_forgotten_moves_no_more_and_changes_nothing_else(name: str) -> None:
    settings = Optimizer.model_validate({"name": name, "lr": 1e-2})
    both, alone = two_sizes(), {"large.weight": two_sizes()["large.weight"]}
    optimizer, other = make_optimizer(both, settings), make_optimizer(alone, settings)
    for step in range(4):
        if step == 2:
            drop_parameters(optimizer, [both["small.weight"]])
            still = both["small.weight"].detach().clone()
        for parameter in both.values():
            parameter.grad = torch.full_like(parameter, 0.1 * (step + 1))
        alone["large.weight"].grad = torch.full_like(alone["large.weight"], 0.1 * (step + 1))
        optimizer.step()
        other.step()
    assert torch.equal(both["small.weight"], still)
    assert torch.equal(both["large.weight"], alone["large.weight"])
    assert list(optimizer.state) == [both["large.weight"]]
