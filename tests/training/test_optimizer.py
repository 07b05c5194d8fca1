"""The learning rate's schedule and what is decayed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from finhpc.config import Optimizer
from finhpc.training.optimizer import learning_rate, make_optimizer


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
