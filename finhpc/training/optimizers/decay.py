"""Weight decay of low-rank products."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def decay_products(pairs: Iterable[tuple[Tensor, Tensor]], strength: float) -> None:
    """Shrink every product B A by a gradient step on strength/2 ||B A||_F^2, in place.

    `pairs`: A (rank, in) and B (out, rank), or several of them with a first dimension more. Weight decay of a dense W
    is such a step on ||W||_F^2; decay of the factors is one on ||A||^2 + ||B||^2, which pulls the product to lower rank
    (M. Khodak et al., "Initialization and Regularization of Factorized Neural Layers", 2021).
    """
    for a, b in pairs:
        gram_a, gram_b = a @ a.mT, b.mT @ b  # both before either changes
        a.sub_(gram_b @ a, alpha=strength)
        b.sub_(b @ gram_a, alpha=strength)
