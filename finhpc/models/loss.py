"""The next-token loss, computed in the memory of the logits.

With a vocabulary of 50,257 the logits are the largest tensor of a step. They are read once and overwritten by their
gradient, some rows at a time in float32 while they are in the cache; torch's way needs a float32 copy, its log-softmax
and two gradients of the same size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROW_BYTES = 8 << 20  # of float32 logits that are processed at a time


class InPlaceCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy in nats of `logits` (rows, vocab) at `targets` (rows,); the logits become its gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        rows, vocab = logits.shape
        total = torch.zeros((), dtype=torch.float64)
        step = max(1, ROW_BYTES // (4 * vocab))
        for part, wanted in zip(logits.split(step), targets[:, None].split(step), strict=True):
            values = part.float()  # the same tensor if it is float32 already
            largest, right = values.amax(1), values.gather(1, wanted)[:, 0].clone()
            p = torch.softmax(values, -1)
            total += (largest - p.amax(1).log() - right).sum()  # log sum exp = largest - log of its probability
            p.scatter_add_(1, wanted, torch.full_like(p[:, :1], -1.0))
            part.copy_(p.mul_(1 / rows))
        ctx.gradient = logits
        return (total / rows).float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        gradient, scale = ctx.gradient, gradients[0]
        del ctx.gradient
        return (gradient if scale == 1 else gradient.mul_(scale.to(gradient.dtype))), None


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats, in float32, of `logits` (rows, vocab) at `targets` (rows,).

    In training on a CPU the logits are overwritten: nothing else may read them.
    """
    if logits.device.type == "cpu" and logits.requires_grad:
        return InPlaceCrossEntropy.apply(logits, targets)  # type: ignore[no-untyped-call, no-any-return]
    return F.cross_entropy(logits.float(), targets)
