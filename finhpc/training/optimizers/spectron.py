"""Spectron: Muon on the factors of low-rank layers, with a step that bounds the change of their product.

P. Janson, E. Oyallon, E. Belilovsky, "Stabilizing Native Low-Rank LLM Pretraining", 2026 (arXiv 2602.12429), algorithm
1: both factors move by rho times their orthogonalized momentum, rho = lr / (s(A) + s(B) + 1) with s the largest
singular value. The product B A then changes by at most lr in spectral norm, whatever the size of the factors, because
rho (s(A) + s(B) + rho) <= lr. Algorithm 3: one power iteration per step gives s, from the vector of the step before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from finhpc.settings.training import Optimizer
from finhpc.training.optimizers.kind import Groups, OptimizerKind, Shape, block_factor, blocks_of, pair_of, pairs
from finhpc.training.optimizers.newton_schulz import orthogonalize

MOMENTUM, POWER = "momentum_buffer", "power_vector"


class Spectron(torch.optim.Optimizer):
    """The step of algorithm 1, with decoupled weight decay before it."""

    def __init__(self, groups: Groups, lr: float, momentum: float) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        factors: list[Tensor] = []
        momenta: list[Tensor] = []
        rates: list[Tensor] = []
        for pair in pairs(self.param_groups):
            states = [self._accumulated(factor, pair.group) for factor in (pair.a, pair.b)]
            vectors = pair.split(*(state[POWER] for state in states))
            for own, (vector_a, vector_b) in zip(pair.split(pair.a, pair.b), vectors, strict=True):
                norm = largest_singular_value(own[0], vector_a) + largest_singular_value(own[1], vector_b)
                rates += [pair.group["lr"] / (norm + 1)] * 2
                factors += own
            for both in pair.split(*(state[MOMENTUM] for state in states)):
                momenta += both
        for i, step in orthogonalize(momenta):
            factors[i].addcmul_(step, rates[i], value=-1)

    def _accumulated(self, factor: nn.Parameter, group: dict[str, Any]) -> dict[str, Tensor]:
        """The state of a factor, after its decay and with its gradient in its momentum."""
        state = self.state[factor]
        if not state:
            state.update(_state(factor))
        factor.mul_(1 - group["lr"] * group["weight_decay"])
        assert factor.grad is not None
        state[MOMENTUM].lerp_(factor.grad, 1 - group["momentum"])
        return state  # type: ignore[no-any-return]


def largest_singular_value(matrix: Tensor, vector: Tensor) -> Tensor:
    """The estimate of one power iteration from `vector`, (rows,), which becomes the next one's unless it is 0."""
    image = matrix @ nn.functional.normalize(matrix.T @ vector, dim=0)
    value: Tensor = torch.linalg.vector_norm(image)
    vector.copy_(torch.where(value > 0, image / value, vector))
    return value


def _state(factor: Tensor, *_: Any) -> dict[str, Tensor]:
    rows = factor.shape[0]
    return {
        MOMENTUM: torch.zeros_like(factor, dtype=torch.float32),
        POWER: torch.full((rows,), rows**-0.5, device=factor.device),
    }


def _make(groups: Groups, settings: Optimizer) -> torch.optim.Optimizer:
    return Spectron(groups, settings.lr, settings.momentum)


def _products(name: str, shapes: Mapping[str, Shape], settings: Optimizer) -> float:
    """The Gram matrix of each factor, its polynomial (see `newton_schulz`), and the product of both."""
    count = blocks_of(*(shapes[other] for other in pair_of(name)))
    rows, columns = shapes[name]
    n, m = sorted((rows // count, columns))
    return count * (2.0 * n**2 * m + 17 * n**3)


SPECTRON = OptimizerKind(
    _make,
    (MOMENTUM, POWER),
    takes=block_factor,
    what="A and B of pairs in transformer blocks",
    state=_state,
    own_rates=True,
    products=_products,
    reads=("momentum",),
)
