"""A dense layer that fades into its factors, y = alpha W x + (1 - alpha) B A x.

Method 3 (FinGPT-HPC, section III.C) starts from a dense model: W is its weight, A and B are the best factors of W, and
alpha falls from near 1 to 0 over a share of the training. Without a dense model this is self-guided training (X. Wei et
al., "Building on Efficient Foundations", 2024, arXiv 2406.16450, section 4; code StructuredFFN, `basiclinear.py`): W
starts as B A and is trained, and alpha falls from 1 by a cosine over the first half of the training. Its authors may
skip W in a pass with probability 1 - alpha, to save operations; here every pass computes W.

At 0 the layer is a `LowRankLinear` and W is removed, so the saved model is an ordinary low-rank model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finhpc.lowrank.layers import LowRankEmbedding, LowRankLinear
from finhpc.settings.pretrain import Method


class BlendLinear(LowRankLinear):
    """y = alpha W x + (1 - alpha) B A x + bias; shapes as `LowRankLinear`, `W`: (out_features, in_features)."""

    alpha: Tensor
    casts_parameters = True  # to the type of its inputs, under autocast

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool, blocks: int = 1) -> None:
        super().__init__(in_features, out_features, rank, bias, blocks)
        self.W = nn.Parameter(torch.empty(out_features, in_features))
        self.register_buffer("alpha", torch.ones(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        low_rank = super().forward(x)
        return _blended(low_rank, F.linear(x, self.W, self.B.bias), self.alpha) if hasattr(self, "W") else low_rank

    def as_product(self, x: Tensor) -> tuple[Tensor, Tensor]:
        narrow, b = super().as_product(x)
        if not hasattr(self, "W"):
            return narrow, b
        wide = torch.cat((self.alpha * x, (1 - self.alpha) * narrow.to(x.dtype)), -1)
        return wide, torch.cat((self.W, b), 1)


class BlendEmbedding(LowRankEmbedding):
    """alpha times a dense embedding plus (1 - alpha) times a `LowRankEmbedding`; `W`: (num_embeddings, dim)."""

    alpha: Tensor

    def __init__(self, num_embeddings: int, dim: int, rank: int) -> None:
        super().__init__(num_embeddings, dim, rank)
        self.W = nn.Parameter(torch.empty(num_embeddings, dim))
        self.register_buffer("alpha", torch.ones(()), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        low_rank = super().forward(tokens)
        return _blended(low_rank, F.embedding(tokens, self.W), self.alpha) if hasattr(self, "W") else low_rank


Blended = BlendLinear | BlendEmbedding


def _blended(low_rank: Tensor, dense: Tensor, alpha: Tensor) -> Tensor:
    """Return alpha dense + (1 - alpha) low_rank, in low_rank's type: the dense layer exactly at 1.

    `alpha` is a tensor because a compiled graph would be made again for every value of a number.
    """
    return torch.lerp(low_rank.float(), dense.float(), alpha).to(low_rank.dtype)


def blend_in(model: nn.Module, trainable: bool) -> None:
    """Add W (uninitialized, same device) to every low-rank layer of `model`, trained or frozen."""
    for name, module in list(model.named_modules()):
        if not isinstance(module, LowRankLinear | LowRankEmbedding):
            continue
        blended: Blended
        with module.A.weight.device:
            if isinstance(module, LowRankLinear):
                bias = module.B.bias is not None
                blended = BlendLinear(module.in_features, module.out_features, module.rank, bias, module.blocks)
            else:
                blended = BlendEmbedding(module.num_embeddings, module.embedding_dim, module.rank)
        blended.W.requires_grad_(trainable)
        model.set_submodule(name, blended)


def set_alpha(modules: Iterable[nn.Module], alpha: float) -> list[Tensor]:
    """Set the alpha of every blended layer among `modules`; at 0 remove its W. Returns the removed W."""
    removed: list[Tensor] = []
    for module in list(modules):  # a copy: removing W must not disturb the iteration
        if not isinstance(module, Blended):
            continue
        module.alpha.fill_(alpha)
        if alpha == 0 and hasattr(module, "W"):
            removed.append(module.W)
            del module.W
    return removed


def alpha_at(method: Method, step: int, steps: int) -> float:
    """Return alpha at `step` (counted from 1) of `steps`: `method.blend_start` first, 0 from `blend_steps` on."""
    last = method.blend_steps(steps)
    if step >= last:
        return 0.0
    done = (step - 1) / (last - 1)
    left = 1 - done if method.blend_schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return method.blend_start * left
