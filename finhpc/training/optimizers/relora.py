"""ReLoRA: a matrix is trained by pairs of low rank, one after another, which add up to a change of high rank.

V. Lialin et al., "ReLoRA: High-Rank Training Through Low-Rank Updates", 2023 (arXiv 2307.05695), algorithm 1; code
Guitaricet/relora, `peft_pretraining/relora.py` and `training_utils.py`. After a start with AdamW on whole matrices, W
is frozen, and its layer computes W x + s B A x with s = 32 / rank. AdamW trains A (rank, in) and B (out, rank). Every
`optimizer.restart_every` steps s B A is added to W, A is drawn again, uniform within in^-1/2, B is 0, and their moments
begin again. The learning rate restarts there too, with `optimizer.schedule=restarts`.

The matrix of that layer is W + s B A, and with its gradient G the gradients of A and B are s B^T G and s G A^T. So here
the model keeps the sum as its dense matrix, and A and B are tensors of the optimizer: the steps are the authors', and
every checkpoint is a dense model. What differs from their code: the passes cost as much as dense ones, because G is
computed for whole matrices; gradients are clipped by the norm of G; pairs have no dropout; and moments begin again as a
whole, with their count of steps, where their code leaves a thousandth of each: a first moment that is left without its
second would be divided by epsilon, because A has no gradient as long as B is 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from finhpc.models.initialize import generator_of
from finhpc.settings.training import Optimizer
from finhpc.training.optimizers.kind import Groups, OptimizerKind, Shape, block_dense, steps_taken

ALPHA = 32.0  # s x rank: the default of their code
WHOLE = ("exp_avg", "exp_avg_sq")
PAIR = ("left", "right")  # of the stored matrix: B and A of one that is (out, in), A^T and B^T of one that is (in, out)
MOMENTS = tuple(f"{moment}_{factor}" for moment in WHOLE for factor in PAIR)


class Relora(torch.optim.AdamW):
    """torch's AdamW for `optimizer.dense_cycles`, then pairs."""

    def __init__(self, groups: Groups, settings: Optimizer) -> None:
        super().__init__(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)
        self.settings = settings
        self.taken: int | None = None  # steps; the first one after a resume reads it

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if self.taken is None:
            self.taken = steps_taken(self)
        self.taken += 1
        if not _has_pairs(self.settings, self.taken):
            super().step()
            return
        for group in self.param_groups:
            for name, weight in zip(group["names"], group["params"], strict=True):
                if (self.taken - 1) % self.settings.restart_every == 0:
                    self._begin_pair(name, weight, name in group["by_inputs"])
                self._train_pair(weight, group)

    def _begin_pair(self, name: str, weight: nn.Parameter, by_inputs: bool) -> None:
        """Give a weight a new pair, the first one or another, with A drawn and B = 0."""
        assert self.taken is not None
        state, rank = self.state[weight], self.settings.rank
        for moment in WHOLE:
            state.pop(moment, None)
        state.update(_pair(weight, self.settings))
        state.setdefault("step", torch.zeros((), device=weight.device))
        inputs = weight.shape[0 if by_inputs else 1]
        drawn = torch.rand(rank, inputs, generator=generator_of(self.taken, f"{name}.relora"))
        a = drawn.mul_(2).sub_(1).mul_(inputs**-0.5)
        left, right = (state[factor] for factor in PAIR)
        (left if by_inputs else right).copy_(a.T if by_inputs else a)

    def _train_pair(self, weight: nn.Parameter, group: dict[str, Any]) -> None:
        """Take AdamW's step of both factors, and change the weight as their product changes."""
        assert weight.grad is not None
        assert self.taken is not None
        state, scale = self.state[weight], ALPHA / self.settings.rank
        state["step"].fill_(self.taken)
        left, right = pair = [state[factor] for factor in PAIR]
        old_left, old_right = (factor.clone() for factor in pair)
        before = (self.taken - 1) % self.settings.restart_every  # steps of this pair
        adamw(
            pair,
            [scale * (weight.grad @ right.T), scale * (left.T @ weight.grad)],
            [state["exp_avg_left"], state["exp_avg_right"]],
            [state["exp_avg_sq_left"], state["exp_avg_sq_right"]],
            [],
            [state["step"].new_full((), before) for _ in pair],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        # From the changes of the factors: the difference of two products would lose digits.
        torch.addmm(weight, left - old_left, right, alpha=scale, out=weight)
        torch.addmm(weight, old_left, right - old_right, alpha=scale, out=weight)


def _has_pairs(settings: Optimizer, step: int) -> bool:
    """Whether pairs are trained in a step, from 1."""
    return (step - 1) // settings.restart_every >= settings.dense_cycles


def _pair(weight: Tensor, settings: Optimizer) -> dict[str, Tensor]:
    shapes = {"left": (weight.shape[0], settings.rank), "right": (settings.rank, weight.shape[1])}
    zeros = {name: shapes[name.rpartition("_")[2]] for name in (*PAIR, *MOMENTS)}
    return {name: weight.new_zeros(shape, dtype=torch.float32) for name, shape in zeros.items()}


def _state(weight: Tensor, settings: Optimizer, steps: int) -> dict[str, Tensor]:
    if _has_pairs(settings, steps):
        return _pair(weight, settings)
    return {name: torch.zeros_like(weight, dtype=torch.float32) for name in WHOLE}


def _products(name: str, shapes: Mapping[str, Shape], settings: Optimizer) -> float:
    """Two products for the gradients of a pair, and two for the weight."""
    rows, columns = shapes[name]
    return 4.0 * settings.rank * rows * columns


RELORA = OptimizerKind(
    Relora,
    (*WHOLE, *PAIR, *MOMENTS),
    takes=block_dense,
    what="dense matrices in transformer blocks",
    state=_state,
    products=_products,
    reads=("rank", "restart_every", "dense_cycles"),
)
