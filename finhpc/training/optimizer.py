"""AdamW over a stage's parameters, what helps low-rank factors train, and the learning rate at a step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from finhpc.config import Optimizer


def make_optimizer(named: dict[str, nn.Parameter], settings: Optimizer) -> torch.optim.AdamW:
    """torch's fused AdamW; weight decay on matrices only, never on biases and norms.

    `named`: Hugging Face name -> parameter; the factors of low-rank layers are called A and B.
    """
    chosen: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named.items():
        factor = name.rpartition(".")[2]
        scale = {"A": settings.lr_scale_a, "B": settings.lr_scale_b}.get(factor, 1.0)
        left_out = parameter.dim() < 2 or (factor in ("A", "B") and settings.decay == "product")
        chosen.setdefault((0.0 if left_out else settings.weight_decay, scale), []).append(parameter)
    groups = [{"params": p, "weight_decay": decay, "lr_scale": scale} for (decay, scale), p in chosen.items()]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group of `make_optimizer` its share of the learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


@torch.no_grad()
def decay_products(pairs: Iterable[tuple[Tensor, Tensor]], strength: float) -> None:
    """Shrink every product B A by a gradient step on strength/2 ||B A||_F^2, in place.

    `pairs`: A (rank, in) and B (out, rank). Weight decay of a dense W is such a step on ||W||_F^2;
    decay of the factors is one on ||A||^2 + ||B||^2, which drives the product to lower rank (M.
    Khodak et al., "Initialization and Regularization of Factorized Neural Layers", 2021).
    """
    for a, b in pairs:
        gram_a, gram_b = a @ a.T, b.T @ b  # of both before either moves
        a.sub_(gram_b @ a, alpha=strength)
        b.sub_(b @ gram_a, alpha=strength)


def learning_rate(settings: Optimizer, step: int, steps: int) -> float:
    """Learning rate of the `step`-th (from 1) of `steps`: linear warm-up, then a cosine to its minimum."""
    if step <= settings.warmup_steps:
        return settings.lr * step / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return settings.lr * (settings.min_lr_ratio + (1 - settings.min_lr_ratio) * cosine)
