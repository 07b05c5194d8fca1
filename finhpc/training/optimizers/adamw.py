"""AdamW (I. Loshchilov, F. Hutter, "Decoupled Weight Decay Regularization", 2019), with moments in 32 or 8 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from finhpc.settings.training import Optimizer
from finhpc.training.optimizers.kind import Groups, OptimizerKind

SMALLEST_8BIT, BLOCK_8BIT = 4096, 256  # bitsandbytes: smaller tensors keep float32 moments; moments to a scale


def _adamw(groups: Groups, settings: Optimizer) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)


def _adamw8bit(groups: Groups, settings: Optimizer) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    optimizer: torch.optim.Optimizer = AdamW8bit(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps)
    return optimizer


def _state8bit(parameter: Tensor, *_: Any) -> dict[str, Tensor]:
    """Moments of one byte with a scale for each 256 of them; small tensors have float32 moments."""
    if parameter.numel() < SMALLEST_8BIT:
        return {name: torch.zeros_like(parameter, dtype=torch.float32) for name in ("state1", "state2")}
    blocks = -(-parameter.numel() // BLOCK_8BIT)
    moments = {name: torch.zeros_like(parameter, dtype=torch.uint8) for name in ("state1", "state2")}
    return moments | {name: parameter.new_zeros(blocks, dtype=torch.float32) for name in ("absmax1", "absmax2")}


ADAMW = OptimizerKind(_adamw, ("exp_avg", "exp_avg_sq"), elementwise=True)
ADAMW_8BIT = OptimizerKind(_adamw8bit, ("state1", "state2", "absmax1", "absmax2"), state=_state8bit)
