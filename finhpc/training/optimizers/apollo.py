"""APOLLO-Mini: AdamW's step size from moments of a random projection, at the memory of SGD.

H. Zhu et al., "APOLLO: SGD-like Memory, AdamW-level Performance", 2024 (arXiv 2412.05270), algorithm 1 with rank 1 and
tensor-wise scaling (code `apollo_torch/apollo.py`): the gradient G (rows, columns) is multiplied by a random vector
over its smaller side, and only the product, a vector, has moments. G itself is scaled by |AdamW's direction of the
product| / |product|, times sqrt(128), and may grow by at most 1 % in norm from step to step (Fira's limiter).
The random vector follows from the parameter's name and the step; a new one is drawn every 200 steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from finhpc.models.initialize import generator_of
from finhpc.settings.training import Optimizer
from finhpc.training.optimizers.kind import Groups, OptimizerKind, Shape, block_matrix, steps_taken

SCALE, RENEWED_EVERY, GROWTH, TINY = 128.0, 200, 1.01, 1e-8
MOMENTS, NORM = ("exp_avg", "exp_avg_sq"), "scaled_norm"


class ApolloMini(torch.optim.Optimizer):
    """The steps of algorithm 1, and AdamW's decoupled weight decay after each."""

    def __init__(self, groups: Groups, settings: Optimizer) -> None:
        super().__init__(groups, {"lr": settings.lr, "weight_decay": 0.0})
        self.betas, self.eps = settings.betas, settings.eps
        self.taken: int | None = None  # steps; the first one after a resume reads it

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if self.taken is None:
            self.taken = steps_taken(self)
        self.taken += 1
        for group in self.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                if parameter.grad is not None:
                    self._update(name, parameter, group["lr"], group["weight_decay"])

    def _update(self, name: str, parameter: nn.Parameter, lr: float, weight_decay: float) -> None:
        assert parameter.grad is not None
        assert self.taken is not None
        state, (beta, beta_sq), grad = self.state[parameter], self.betas, parameter.grad
        if not state:
            state.update(_state(parameter), step=torch.zeros(()))
        state["step"].fill_(self.taken)
        mean, square = (state[moment] for moment in MOMENTS)
        projected = _projected(grad, name, (self.taken - 1) // RENEWED_EVERY)
        mean.lerp_(projected, 1 - beta)
        square.mul_(beta_sq).addcmul_(projected, projected, value=1 - beta_sq)
        ratio = (mean / (square.sqrt() + self.eps)).norm() / (projected.norm() + TINY)
        norm = ratio * grad.norm()
        before = state[NORM]
        limiter = torch.where(before > 0, (norm / (before + TINY)).clamp(min=GROWTH) / GROWTH, 1.0)
        before.copy_(norm / limiter)
        size = lr * math.sqrt(1 - beta_sq**self.taken) / (1 - beta**self.taken) * math.sqrt(SCALE)
        parameter.addcmul_(grad, ratio / limiter, value=-size)
        parameter.mul_(1 - lr * weight_decay)


def _projected(grad: Tensor, name: str, draw: int) -> Tensor:
    """The product of a gradient and a random vector over its smaller side, a vector over its larger one."""
    random = torch.randn(min(grad.shape), generator=generator_of(draw, f"{name}.apollo")).to(grad.device)
    return grad @ random if grad.shape[0] >= grad.shape[1] else random @ grad


def _state(parameter: Tensor, *_: Any) -> dict[str, Tensor]:
    state = {name: parameter.new_zeros(max(parameter.shape), dtype=torch.float32) for name in MOMENTS}
    return state | {NORM: torch.zeros((), device=parameter.device)}


def _products(name: str, shapes: Mapping[str, Shape], settings: Optimizer) -> float:
    return float(math.prod(shapes[name]))


APOLLO_MINI = OptimizerKind(
    ApolloMini,
    (*MOMENTS, NORM),
    takes=block_matrix,
    what="matrices in transformer blocks",
    state=_state,
    products=_products,
)
