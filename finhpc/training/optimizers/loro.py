"""LORO: AdamW on the factors, and every `optimizer.restart_every` steps an exact step of their product.

Z. Mo, L.-K. Huang, S. J. Pan, "Parameter and Memory Efficient Pretraining via Low-rank Riemannian Optimization", 2025
(ICLR; code LORO-main, `loro_optim.py`). The product W = B A moves against the gradient projected onto the tangent space
of the matrices of its rank, and the result is retracted to that rank by an SVD of 2 rank x 2 rank. As in the code, the
gradients of A and B in an exact step are AdamW's directions, and the moments of all parameters begin again after it.
The learning rate of the other steps is that of `optimizer.rates`, which the authors set to loro; an exact step takes
the rate of the rest.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from finhpc.settings.training import Optimizer
from finhpc.training.optimizers.kind import Groups, OptimizerKind, block_factor, pairs, steps_taken

MOMENTS = ("exp_avg", "exp_avg_sq")


class Loro(torch.optim.AdamW):
    """torch's AdamW, whose steps of pairs are replaced by exact ones from time to time."""

    def __init__(self, groups: Groups, settings: Optimizer) -> None:
        super().__init__(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)
        self.restart_every = settings.restart_every
        self.taken: int | None = None  # steps since the moments began; the first step after a resume reads it

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if self.taken is None:
            self.taken = steps_taken(self)
        self.taken += 1
        if self.taken < self.restart_every:
            super().step()
            return
        found = [pair for pair in pairs(self.param_groups) if block_factor(pair.name, tuple(pair.a.shape))]
        before = [(pair.a.clone(), pair.b.clone()) for pair in found]
        super().step()
        for pair, old in zip(found, before, strict=True):
            directions = [self._direction(factor, pair.group) for factor in (pair.a, pair.b)]
            parts = (pair.split(*both) for both in (old, directions, (pair.a, pair.b)))
            for (old_a, old_b), (d_a, d_b), (a, b) in zip(*parts, strict=True):
                new_a, new_b = exact_step(old_a, old_b, d_a, d_b, pair.group["lr"] / pair.group["lr_scale"])
                a.copy_(new_a)
                b.copy_(new_b)
        for state in self.state.values():
            for name in ("step", *MOMENTS):
                state[name].zero_()
        self.taken = 0

    def _direction(self, factor: nn.Parameter, group: dict[str, Any]) -> Tensor:
        """AdamW's step of a factor at a learning rate of 1, from the moments of this step."""
        assert self.taken is not None
        state, (beta, beta_sq) = self.state[factor], group["betas"]
        mean, square = state["exp_avg"] / (1 - beta**self.taken), state["exp_avg_sq"] / (1 - beta_sq**self.taken)
        direction: Tensor = mean / (square.sqrt() + group["eps"])
        return direction


def exact_step(a: Tensor, b: Tensor, grad_a: Tensor, grad_b: Tensor, lr: float) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) after an exact step with the gradients of A and B, which are B^T G and G A^T.

    With orthonormal bases U of B's columns and V of A's rows, the projected gradient is U U^T G + (1 - U U^T) G V V^T,
    so the moved product is [U, X] M [V, Y]^T with X = (1 - U U^T) G V and Y^T = U^T G (1 - V V^T). The new factors are
    the best ones of their rank, with equal singular values.
    """
    rank = a.shape[0]
    u, r_b = torch.linalg.qr(b)
    v, r_a = torch.linalg.qr(a.T)
    g_v = torch.linalg.solve(r_a, grad_b, left=False)  # grad_b = G V r_a
    ut_g = torch.linalg.solve(r_b.T, grad_a)  # grad_a = r_b^T U^T G
    core = ut_g @ v
    q_u, r_u = torch.linalg.qr(torch.cat([u, g_v - u @ (u.T @ g_v)], 1))
    q_v, r_v = torch.linalg.qr(torch.cat([v, ut_g.T - v @ core.T], 1))
    middle = torch.zeros(2 * rank, 2 * rank, dtype=a.dtype, device=a.device)
    middle[:rank, :rank] = r_b @ r_a.T - lr * core
    middle[:rank, rank:] = middle[rank:, :rank] = -lr * torch.eye(rank, dtype=a.dtype, device=a.device)
    left, values, right = torch.linalg.svd(r_u @ middle @ r_v.T)
    roots = values[:rank].sqrt()
    return (roots[:, None] * right[:rank]) @ q_v.T, q_u @ (left[:, :rank] * roots)


def _state(parameter: Tensor, *_: Any) -> dict[str, Tensor]:
    moments = {name: torch.zeros_like(parameter, dtype=torch.float32) for name in MOMENTS}
    return moments | {"step": torch.zeros((), device=parameter.device)}  # begins again with the moments


LORO = OptimizerKind(
    Loro,
    (*MOMENTS, "step"),
    what="A and B of pairs in transformer blocks, whose product is the layer,",
    state=_state,
    needs=block_factor,
    of_products=True,
    reads=("restart_every",),
)
