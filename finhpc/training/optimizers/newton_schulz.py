"""Orthogonalization of matrices by Newton-Schulz iterations on their small Gram matrices.

Muon (K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024) replaces a matrix X with the
singular value decomposition U S V^T by U f(S) V^T, f(s) near 1, in five steps X <- a X + b X X^T X + c (X X^T)^2 X.
Each step is a polynomial in the Gram matrix X X^T times X, so all of them together are P X, with P computed from the
r x r Gram matrix alone. X is read for its Gram matrix and for one product, which for a factor of low rank is a fraction
of the operations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

COEFFICIENTS = 3.4445, -4.7750, 2.0315  # Jordan et al.'s, as in torch.optim.Muon
STEPS, EPS = 5, 1e-7


def orthogonalize(matrices: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Yield the index of each matrix (rows, columns) and its orthogonal matrix, one at a time.

    Matrices whose smaller sides are equal are iterated together. Singular values below 1e-3 of the largest are less
    exact than in iterations on the whole matrix, because the Gram matrix has their squares.
    """
    by_side: dict[int, list[int]] = {}
    for i, matrix in enumerate(matrices):
        by_side.setdefault(min(matrix.shape), []).append(i)
    for places in by_side.values():
        wide = [_wide(matrices[i]) for i in places]
        polynomials = _polynomials(torch.stack([matrix @ matrix.T for matrix in wide]))
        for i, matrix, polynomial in zip(places, wide, polynomials, strict=True):
            product = polynomial @ matrix
            yield i, product if matrix.shape == matrices[i].shape else product.T


def _wide(matrix: Tensor) -> Tensor:
    """The matrix, or its transpose if it has more rows than columns."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


def _polynomials(grams: Tensor) -> Tensor:
    """P of each Gram matrix X X^T (count, r, r), so that P X is the orthogonalized X.

    With S_0 = X X^T / |X|^2 and Q_k = a + b S_k + c S_k^2, S_{k+1} = Q_k S_k Q_k and P = Q_4 ... Q_0 / |X|. All of
    them commute.
    """
    a, b, c = COEFFICIENTS
    norms = grams.diagonal(dim1=1, dim2=2).sum(1).sqrt().clamp(min=EPS)[:, None, None]
    s = grams / norms.square()
    product: Tensor | None = None
    for step in range(STEPS):
        q = torch.baddbmm(s, s, s, beta=b, alpha=c)
        q.diagonal(dim1=1, dim2=2).add_(a)
        product = q if product is None else torch.bmm(q, product)
        if step < STEPS - 1:
            s = torch.bmm(q, torch.bmm(q, s))
    assert product is not None
    return product / norms
