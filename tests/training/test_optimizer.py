"""The learning rate's schedule and what is decayed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from finhpc.lowrank.layers import LowRankEmbedding, LowRankLinear
from finhpc.settings.training import Optimizer
from finhpc.training.optimizers.decay import decay_products
from finhpc.training.optimizers.schedules import learning_rate
from finhpc.training.optimizers.stage import make_optimizer, moments, set_lr


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


def test_linear_and_wsd_fall_as_they_are_named() -> None:
    shared = {"lr": 1.0, "warmup_steps": 10, "min_lr_ratio": 0.1}
    linear = Optimizer.model_validate({**shared, "schedule": "linear"})
    assert learning_rate(linear, 60, 110) == pytest.approx(0.55)
    assert learning_rate(linear, 85, 110) == pytest.approx(0.325)
    wsd = Optimizer.model_validate({**shared, "schedule": "wsd", "cooldown_share": 0.25})
    rates = [learning_rate(wsd, step, 120) for step in range(1, 121)]
    assert rates[9:90] == [1.0] * 81
    assert rates[104] == pytest.approx(0.55)  # half of the last 30 steps
    assert rates[119] == pytest.approx(0.1)
    longer = [learning_rate(wsd, step, 240) for step in range(1, 91)]
    assert longer == rates[:90], "a longer run shares the stable part"
    whole = Optimizer.model_validate({**shared, "schedule": "wsd", "cooldown_share": 1.0})
    assert learning_rate(whole, 60, 110) == pytest.approx(learning_rate(linear, 60, 110))


def test_restarts_warm_up_to_the_cosine_again() -> None:
    shared = {"lr": 1.0, "warmup_steps": 10, "min_lr_ratio": 0.1, "restart_every": 50, "restart_warmup_steps": 5}
    restarts = Optimizer.model_validate({**shared, "schedule": "restarts"})
    cosine = Optimizer.model_validate(shared)
    rates = [learning_rate(restarts, step, 210) for step in range(1, 211)]
    smooth = [learning_rate(cosine, step, 210) for step in range(1, 211)]
    for begin in (50, 100, 150, 200):
        end = smooth[begin + 4]  # of the fifth step of the cycle
        assert rates[begin : begin + 5] == pytest.approx([end * i / 5 for i in (1, 2, 3, 4, 5)])
    rising = [step for step in range(50, 210) if step % 50 < 4]
    assert [rate for i, rate in enumerate(rates) if i not in rising] == [
        rate for i, rate in enumerate(smooth) if i not in rising
    ]
    assert rates[109] == pytest.approx(0.55)  # half way down
    cut = [learning_rate(restarts, step, 202) for step in (201, 202)]
    assert cut == pytest.approx([0.02, 0.04]), "it ends during a warm-up, which aims at the minimum"
    none = Optimizer.model_validate({**shared, "schedule": "restarts", "restart_warmup_steps": 0})
    assert [learning_rate(none, step, 210) for step in range(1, 211)] == smooth


@pytest.mark.parametrize("schedule", ["linear", "wsd"])
@pytest.mark.parametrize("steps", [1, 2, 3, 20, 40])
def test_other_schedules_reach_their_peak_and_their_end(schedule: str, steps: int) -> None:
    settings = Optimizer.model_validate({"lr": 1.0, "schedule": schedule})
    rates = [learning_rate(settings, step, steps) for step in range(1, steps + 1)]
    assert max(rates) == 1.0
    assert steps == 1 or rates[-1] == pytest.approx(0.1)


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


@pytest.mark.parametrize(
    ("rule", "a", "b", "embedding"),
    [
        ("plain", 1.0, 1.0, 1.0),
        ("mup", 0.5, 6 / (2 * 2), 1.0),
        ("loro", 2 / 4, 2 / 4, 1.0),
        ("loraplus", 1.0, 16.0, 1.0),
    ],
)
def test_each_factor_learns_at_the_rate_of_the_rule(rule: str, a: float, b: float, embedding: float) -> None:
    layer, table = LowRankLinear(6, 4, 2, bias=True), LowRankEmbedding(7, 5, 3)
    named = {f"h.{name}": p for name, p in layer.named_parameters()}
    named |= {f"wte.{name}": p for name, p in table.named_parameters()}
    settings = Optimizer.model_validate({"lr": 0.1, "weight_decay": 0.0, "rates": rule})
    optimizer = make_optimizer(named, settings)
    with torch.no_grad():
        for parameter in named.values():
            parameter.zero_()
            parameter.grad = torch.ones_like(parameter)
    set_lr(optimizer, 0.01)
    optimizer.step()  # Adam's first step moves every element by the learning rate
    expected = {"h.A.weight": a, "h.B.weight": b, "h.B.bias": 1.0, "wte.A.weight": embedding, "wte.B.weight": embedding}
    for name, rate in expected.items():
        torch.testing.assert_close(named[name].detach(), torch.full_like(named[name], -0.01 * rate), rtol=1e-4, atol=0)


def test_the_rate_of_some_rows_is_that_of_the_whole() -> None:
    whole = {"h.0.fc.A.weight": (4, 12), "h.0.fc.B.weight": (8, 4)}
    rows = {"h.0.fc.B.weight": nn.Parameter(torch.ones(3, 4))}  # what one replica updates
    optimizer = make_optimizer(rows, Optimizer(rates="mup"), whole)
    assert optimizer.param_groups[0]["lr_scale"] == 12 / (2 * 4)


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
