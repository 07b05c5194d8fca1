"""Muon (K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024): torch's.

The step of a matrix W (rows, columns) is its momentum, orthogonalized, times 0.2 sqrt(max(rows, columns)), so that its
root mean square is about that of AdamW's step and one learning rate serves both (J. Liu et al., "Muon is Scalable for
LLM Training", 2025, section 2.2). Factors A and B are matrices like others. AdamW updates what is no matrix of a block.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from finhpc.settings.training import Optimizer
from finhpc.training.optimizers.kind import Groups, OptimizerKind, Shape, block_matrix, blocks_of, factor_of, pair_of

FUSED = {"c_attn": 3}  # layers whose dense matrix has those of queries, keys and values side by side


class Muon(torch.optim.Muon):
    """torch's Muon; the matrices of queries, keys and values are orthogonalized apart, as its authors advise."""

    def __init__(self, groups: Groups, lr: float, momentum: float) -> None:
        super().__init__(groups, lr=lr, momentum=momentum, adjust_lr_fn="match_rms_adamw")
        shapes = {n: tuple(p.shape) for group in groups for n, p in zip(group["names"], group["params"], strict=True)}
        self.counts = {name: matrices_in(name, shapes) for name in shapes}

    def _init_group(
        self,
        group: MutableMapping[str, Any],
        params_with_grad: list[Tensor],
        grads: list[Tensor],
        muon_momentum_bufs: list[Tensor],
    ) -> Any:
        is_complex = super()._init_group(group, params_with_grad, grads, muon_momentum_bufs)
        names = [n for n, p in zip(group["names"], group["params"], strict=True) if p.grad is not None]
        for tensors in (params_with_grad, grads, muon_momentum_bufs):
            tensors[:] = [m for name, t in zip(names, tensors, strict=True) for m in pieces(name, t, self.counts[name])]
        return is_complex


def matrices_in(name: str, shapes: Mapping[str, Shape]) -> int:
    """How many matrices a parameter contains: those of queries, keys and values, dense or in pairs of their own."""
    if factor_of(name):
        return blocks_of(*(shapes[other] for other in pair_of(name))) or 1
    return FUSED.get(name.removesuffix(".weight").removesuffix(".W").rpartition(".")[2], 1)


def pieces(name: str, whole: Tensor, count: int) -> tuple[Tensor, ...]:
    """Views of the matrices that a parameter contains, which lie along B's and A's rows, or the longer side of W."""
    return whole.chunk(count, dim=int(factor_of(name) is None and whole.shape[1] > whole.shape[0]))


def _make(groups: Groups, settings: Optimizer) -> torch.optim.Optimizer:
    return Muon(groups, settings.lr, settings.momentum)


def _products(name: str, shapes: Mapping[str, Shape], settings: Optimizer) -> float:
    """Five iterations X <- a X + (b X X^T + c (X X^T)^2) X of each matrix."""
    sides = (
        sorted(piece.shape)
        for piece in pieces(name, torch.empty(shapes[name], device="meta"), matrices_in(name, shapes))
    )
    return sum(5.0 * (2 * n**2 * m + n**3) for n, m in sides)


MUON = OptimizerKind(
    _make,
    ("momentum_buffer",),
    takes=block_matrix,
    what="matrices in transformer blocks",
    products=_products,
    precision="bf16",
    reads=("momentum",),
)
