"""The best rank-r factors of a matrix: in its own norm, or for what its layer puts out.

The eigenvectors of the smaller Gram matrix are the singular vectors of one side, and give the other
side by one product: several times faster than a full SVD. A Gram matrix squares the singular values,
so float32 would lose all below 3e-4 of the largest; it is summed and solved in float64, which keeps
those above 1e-8. Only the last product is in the weight's own precision.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 256  # rows of the Gram matrix computed at a time
CHUNK = 4096  # columns converted to float64 at a time
SINGULAR = 1e-10  # smallest over largest squared pivot of a usable Cholesky factor
DAMPINGS = (0.0, 1e-10, 1e-9, 1e-8, 1e-7, 1e-6)  # tried in turn, as shares of the mean squared input


@dataclass(frozen=True)
class Spectrum:
    """All singular values of a matrix (out, in) and the directions of its smaller side, in float64."""

    values: Tensor  # (min(out, in),), largest first
    vectors: Tensor  # (min, min), one a column: left ones where out <= in, else right ones

    def optimum(self, rank: int) -> float:
        """The smallest error in the Frobenius norm that any matrix of that rank can have (Eckart-Young)."""
        return float(self.values[rank:].square().sum().sqrt())


def gram(rows: Tensor) -> Tensor:
    """The lower triangle of X X^T for X (..., n, k), in float64; what stands above it is not to be read."""
    *batch, n, k = rows.shape
    total = torch.zeros(*batch, n, n, dtype=torch.float64, device=rows.device)
    for begin in range(0, k, CHUNK):
        x = rows[..., begin : begin + CHUNK].double()
        for top in range(0, n, BLOCK):
            below = slice(top, None)
            total[..., below, top : top + BLOCK] += x[..., below, :] @ x[..., top : top + BLOCK, :].mT
    return total


def spectra(weights: Tensor) -> list[Spectrum]:
    """The spectrum of each of some same-shaped matrices (batch, out, in), solved together on their device."""
    out_features, in_features = weights.shape[-2:]
    squares, vectors = torch.linalg.eigh(gram(weights if out_features <= in_features else weights.mT))
    values = squares.clamp_min(0).sqrt().flip(-1)
    vectors = vectors.flip(-1)
    return [Spectrum(values[i], vectors[i]) for i in range(len(weights))]


def factors(weight: Tensor, spectrum: Spectrum, rank: int, root: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) of the best B A, given the spectrum of W (out, in), or of W S.

    With `root` = S, B A makes ||(W - B A) S|| smallest: it is the truncated W S multiplied back by
    S^-1 (SVD-LLM, Wang et al. 2024), and equals U U^T W with U the leading left directions of W S,
    which needs no inverse. Each pair of directions is balanced: a row of A is as long as its column
    of B.
    """
    out_features, in_features = weight.shape
    leading = spectrum.vectors[:, :rank]
    if out_features > in_features and root is None:
        a = _signed(leading).to(weight.dtype).T
        return _balanced(a, weight @ a.T)
    if out_features > in_features:
        assert root is not None
        leading = torch.linalg.qr(weight.double() @ (root @ leading)).Q
    b = _signed(leading).to(weight.dtype)
    return _balanced(b.T @ weight, b)


def truncated_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A (rank, in) and B (out, rank) with B A the best rank-`rank` approximation of W (out, in).

    Optimal in the Frobenius norm (Eckart-Young), the singular values split evenly as square roots.
    The sign of each direction is fixed (its largest entry is positive), so that factors do not
    depend on the solver. Raises `ValueError` for a rank that does not fit.
    """
    out_features, in_features = weight.shape
    if not 1 <= rank <= min(out_features, in_features):
        raise ValueError(f"rank={rank} does not fit a {out_features} x {in_features} matrix")
    working = weight if weight.dtype == torch.float64 else weight.float()
    a, b = factors(working, spectra(working[None])[0], rank)
    return a.to(weight.dtype), b.to(weight.dtype)


def whitening_root(moment: Tensor) -> tuple[Tensor, float]:
    """S, lower triangular with S S^T = C + d mean(diag C) I, for the second moment C (in, in) of inputs; and d.

    d is 0 unless C is singular to working precision, as where fewer tokens than features were seen.
    Raises `ValueError` where C is no second moment: negative, or all zero.
    """
    scale = moment.diagonal().mean()
    for damping in DAMPINGS:
        damped = moment.clone()
        damped.diagonal().add_(damping * scale)
        root, info = torch.linalg.cholesky_ex(damped)
        pivots = root.diagonal().square()
        if int(info) == 0 and float(pivots.min()) >= SINGULAR * float(pivots.max()) > 0:
            return root, damping
    raise ValueError("the second moment of the inputs is not positive")


def residual(weight: Tensor, a: Tensor, b: Tensor, root: Tensor | None = None) -> float:
    """||W - B A||, or ||(W - B A) S||, in the Frobenius norm, summed in float64."""
    left = torch.addmm(weight, b, a, alpha=-1)
    if root is not None:
        return float(torch.linalg.norm(left.double() @ root))
    return float(torch.linalg.norm(left, dtype=torch.float64))


def _signed(vectors: Tensor) -> Tensor:
    """The same directions (columns), each with its largest entry positive."""
    largest = vectors.abs().argmax(0, keepdim=True)
    return vectors * vectors.gather(0, largest).sign()


def _balanced(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with the length of each pair shared evenly."""
    long_a, long_b = torch.linalg.norm(a, dim=1), torch.linalg.norm(b, dim=0)
    # A direction that is zero but for rounding stays small instead of being blown up.
    long_a = long_a.clamp_min(float(long_a.max()) * 1e-8 or 1e-30)
    long_b = long_b.clamp_min(float(long_b.max()) * 1e-8 or 1e-30)
    scale = (long_a / long_b).sqrt()
    return a / scale[:, None], b * scale
