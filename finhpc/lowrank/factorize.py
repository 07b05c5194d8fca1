"""The best rank-r factors of a matrix."""

from __future__ import annotations

import torch
from torch import Tensor


def truncated_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A (rank, in) and B (out, rank) with B A the best rank-`rank` approximation of W (out, in).

    Optimal in the Frobenius norm (Eckart-Young), the singular values split evenly as square roots.
    Takes the eigenvectors of the smaller Gram matrix, in float64: several times faster than a full
    SVD and as exact for the leading directions. The sign of each direction is fixed (its largest
    entry is positive), so that factors do not depend on the solver.
    """
    out_features, in_features = weight.shape
    if not 1 <= rank <= min(out_features, in_features):
        raise ValueError(f"rank={rank} does not fit a {out_features} x {in_features} matrix")
    w = weight.double()
    wide = out_features <= in_features
    gram = w @ w.T if wide else w.T @ w
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values[-rank:].flip(0), vectors[:, -rank:].flip(1)
    largest = vectors.abs().argmax(0, keepdim=True)
    vectors = vectors * vectors.gather(0, largest).sign()
    # Square roots of the singular values; those that are zero but for rounding must not be divided by.
    root = values.clamp_min(max(float(values[0]), 1e-300) * torch.finfo(torch.float64).eps).pow(0.25)
    if wide:
        b = vectors * root
        a = (vectors / root).T @ w
    else:
        a = (vectors * root).T
        b = w @ (vectors / root)
    return a.to(weight.dtype), b.to(weight.dtype)
