"""AdamW over a stage's parameters, and the learning rate at a step."""

from __future__ import annotations

import math

import torch
from torch import nn

from finhpc.config import Optimizer


def make_optimizer(named: dict[str, nn.Parameter], settings: Optimizer) -> torch.optim.AdamW:
    """torch's fused AdamW; weight decay on matrices only, never on biases and norms."""
    matrices = [p for p in named.values() if p.dim() >= 2]
    vectors = [p for p in named.values() if p.dim() < 2]
    groups = [
        {"params": params, "weight_decay": decay}
        for params, decay in ((matrices, settings.weight_decay), (vectors, 0.0))
        if params
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)


def learning_rate(settings: Optimizer, step: int, steps: int) -> float:
    """Learning rate of the `step`-th (from 1) of `steps`: linear warm-up, then a cosine to its minimum."""
    if step <= settings.warmup_steps:
        return settings.lr * step / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return settings.lr * (settings.min_lr_ratio + (1 - settings.min_lr_ratio) * cosine)
