"""Duplicated latent residuals: B starts with a copy of each latent coordinate for a group of outputs, and keeps it.

D. Wang et al., "DLR: Zero-Inference-Cost Latent Residuals for Low-Rank Pre-Training" (arXiv 2606.28932), trains
y = B z + alpha / sqrt(K) Expand_K(z), in which Expand_K repeats each coordinate of the latent z K = ceil(out / rank)
times and cuts the result to `out` outputs, and folds the second term into B afterwards: B* = B + alpha / sqrt(K) R. As
both terms are linear in z, B has the gradient of B*, so that training B* itself takes the same steps, if it starts at
B + alpha / sqrt(K) R and if weight decay pulls it there instead of to 0. So here a DLR layer is an ordinary one with
another initialization: it costs nothing in training and has nothing to fold.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Generator, Tensor

from finhpc.lowrank.initialize import cola
from finhpc.lowrank.layers import LowRankLinear, split

ALPHA = 1.0  # the paper's


def dlr(dense: Tensor, rank: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """CoLA's initialization, as in the paper's code, plus the duplicated latent in B."""
    a, b = cola(dense, rank, generator)
    columns, scale = duplicates(len(b), rank)
    b[torch.arange(len(b)), columns] += scale
    return a, b


def duplicates(out_features: int, rank: int) -> tuple[Tensor, float]:
    """Return the latent coordinate that each output gets a copy of, int64 (out_features,), and alpha / sqrt(K)."""
    times = math.ceil(out_features / rank)
    return torch.arange(out_features) // times, ALPHA / math.sqrt(times)


@torch.no_grad()
def keep_residual(
    layers: Mapping[str, LowRankLinear], updated: Mapping[str, Tensor], groups: Iterable[dict[str, Any]]
) -> None:
    """Add to each layer's B what the decay of the next optimizer step will take from its residual.

    `layers`: name of the weight of B -> layer. `updated`: name -> the parameter that the optimizer has in one of its
    `groups`; a layer that is not there is updated elsewhere. Decay multiplies a weight by 1 - s, s = learning rate
    times weight decay, and (1 - s) (B + d) = B - s (B - alpha / sqrt(K) R) for d = s / (1 - s) alpha / sqrt(K) R.
    """
    shares = {id(p): group["lr"] * group["weight_decay"] for group in groups for p in group["params"]}
    for name, layer in layers.items():
        share = shares[id(updated[name])] if name in updated else 0.0
        for block in split(layer.B.weight, layer.blocks) if share else ():
            columns, scale = duplicates(len(block), layer.rank)
            rows = torch.arange(len(block), device=block.device)
            block[rows, columns.to(block.device)] += scale * share / (1 - share)
