"""Ways to initialize A and B; `registry.py` has them by name.

Every scheme gets the dense matrix that a dense layer would start with, so a low-rank model and its dense twin of the
same seed start from the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from finhpc.lowrank.factorize import truncated_svd

Scheme = Callable[[Tensor, int, Generator], tuple[Tensor, Tensor]]


def spectral(dense: Tensor, rank: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """The truncated SVD of the dense initialization, singular values split as square roots."""
    return truncated_svd(dense, rank)


def normal(dense: Tensor, rank: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Independent normal A and B whose product has the variance of the dense initialization."""
    out_features, in_features = dense.shape
    std = (dense.std() / rank**0.5).sqrt().item()
    a = torch.randn(rank, in_features, generator=generator) * std
    b = torch.randn(out_features, rank, generator=generator) * std
    return a, b


def cola(dense: Tensor, rank: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Normal with standard deviation (in + out)^-1/4 rank^-1/4 for both factors (CoLA, 2025)."""
    out_features, in_features = dense.shape
    std = (in_features + out_features) ** -0.25 * rank**-0.25
    a = torch.randn(rank, in_features, generator=generator) * std
    b = torch.randn(out_features, rank, generator=generator) * std
    return a, b


def sltrain(dense: Tensor, rank: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """A uniform within in^-1/2, B zero (SLTrain, 2024)."""
    out_features, in_features = dense.shape
    return uniform(rank * in_features, in_features, generator).view(rank, -1), torch.zeros(out_features, rank)


def uniform(count: int, in_features: int, generator: Generator) -> Tensor:
    """Numbers between -in^-1/2 and in^-1/2."""
    bound = float(in_features**-0.5)
    return torch.empty(count).uniform_(-bound, bound, generator=generator)
