"""The best rank-r factors of a matrix: in its own norm, or for the outputs of its layer.

The eigenvectors of the smaller Gram matrix are the singular vectors of one side, and give the other side by one
product: several times faster than a full SVD. On the CPU matrices are solved one by one (`blas`), on a GPU same-shaped
ones together. A Gram matrix squares the singular values, so in float32 those below 3e-4 of the largest are lost. That
does not matter if much is cut off, as with most trained layers; if it could cost a thousandth of the smallest error,
the work is repeated in float64, which resolves singular values to 1e-8 and takes twice as long. GPUs use only float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from finhpc.lowrank.blas import eigh, gram, product

# Error of an eigenvalue of a float32 Gram matrix, as a share of the largest; ten times what is usual.
NOISE = 10 * torch.finfo(torch.float32).eps
SMALL = 1e-2  # of the largest singular value: smaller ones are measured on the matrix itself
TELLING = 1e-2  # of the squared norm: a smaller squared error is measured, not computed from the factors
SINGULAR = 1e-10  # smallest over largest squared pivot of a usable Cholesky factor
DAMPINGS = (0.0, 1e-10, 1e-9, 1e-8, 1e-7, 1e-6)  # tried in turn, as shares of the mean squared input


@dataclass(frozen=True)
class Spectrum:
    """All singular values of a matrix (out, in) and the directions of its smaller side."""

    values: Tensor  # (min(out, in),), largest first, float64
    directions: Tensor  # (min, min), one a column, the weakest first: left ones where out <= in, else right ones

    def leading(self, rank: int) -> Tensor:
        """Return the strongest directions (min, rank), the strongest first."""
        return self.directions[:, self.directions.shape[1] - rank :].flip(-1)

    def optimum(self, rank: int) -> float:
        """Return the smallest error in the Frobenius norm that a matrix of that rank can have (Eckart-Young)."""
        return float(self.values[rank:].square().sum().sqrt())

    def resolves(self, rank: int) -> bool:
        """Return whether the leading directions are exact enough for an error within 1.001 of the optimum.

        The directions of a Gram matrix with error d cost at most 2 rank d in the squared error (Ky Fan).
        """
        if self.directions.dtype == torch.float64:
            return True
        lost = 2 * rank * NOISE * float(self.values[0]) ** 2
        return lost <= 0.002 * self.optimum(rank) ** 2


def spectra(weights: Sequence[Tensor], dtype: torch.dtype = torch.float64) -> list[Spectrum]:
    """Return the spectrum of each of several same-shaped matrices (out, in), on their device.

    In float64 singular values are exact to 1e-8 of the largest, in float32 to 1e-5 of it or 0.3 %.
    """
    if not weights[0].is_cuda:
        solutions = [eigh(gram(_short(weight), dtype)) for weight in weights]
    else:
        solutions = list(zip(*torch.linalg.eigh(gram(_short(torch.stack(list(weights))), dtype)), strict=True))
    results = []
    for weight, (squares, directions) in zip(weights, solutions, strict=True):
        values = squares.double().clamp_min(0).sqrt().flip(-1)
        known = int((values >= SMALL * values[0]).sum())
        if dtype == torch.float32 and known < len(values):
            left = product(directions[:, : len(values) - known].T, _short(weight))
            values[known:] = torch.linalg.eigvalsh(gram(left)).clamp_min(0).sqrt().flip(-1)
        results.append(Spectrum(values, directions))
    return results


def solved(weights: Sequence[Tensor], rank_of: Callable[[int, Spectrum], int]) -> list[tuple[Spectrum, int]]:
    """Return spectrum and rank of each of several same-shaped matrices (out, in), in float32 if it resolves the rank.

    `rank_of` returns the rank of the matrix of that index from its spectrum. GPUs use float64: cuSOLVER's float32
    eigenvalues were wrong by 500 eps of the largest (H100, CUDA 13, 192 x 192), LAPACK's by 4.
    """
    exact = weights[0].is_cuda or weights[0].dtype == torch.float64
    results = []
    for i, spectrum in enumerate(spectra(weights, torch.float64 if exact else torch.float32)):
        rank = rank_of(i, spectrum)
        if not spectrum.resolves(rank):
            spectrum = spectra([weights[i]])[0]
            rank = rank_of(i, spectrum)
        results.append((spectrum, rank))
    return results


def factors(weight: Tensor, spectrum: Spectrum, rank: int, root: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return A (rank, in) and B (out, rank) of the best B A, given the spectrum of W (out, in), or of W S.

    With `root` = S, B A minimizes ||(W - B A) S||: it is the truncated W S multiplied back by
    S^-1 (SVD-LLM, Wang et al. 2024), and equals U U^T W with U the leading left directions of W S,
    which needs no inverse. Each pair of directions is balanced: a row of A has the length of its
    column of B.
    """
    out_features, in_features = weight.shape
    leading = spectrum.leading(rank)
    if out_features > in_features and root is None:
        right = _signed(leading).to(weight.dtype)
        return _balanced(right.T, product(weight, right))
    if out_features > in_features:
        assert root is not None
        leading = torch.linalg.qr(product(weight.double(), product(root, leading))).Q
    left = _signed(leading).to(weight.dtype)
    return _balanced(product(left.T, weight), left)


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
    ((spectrum, _),) = solved([working], lambda i, spectrum: rank)
    a, b = factors(working, spectrum, rank)
    return a.to(weight.dtype), b.to(weight.dtype)


def whitening_root(moment: Tensor) -> tuple[Tensor, float]:
    """Return S, lower triangular with S S^T = C + d mean(diag C) I, for the second moment C (in, in) of inputs; and d.

    d is 0 unless C is singular to working precision, for example with fewer tokens than features. Raises `ValueError`
    if C is not a second moment: negative, or all zero.
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
    """Return ||W - B A||, or ||(W - B A) S||, in the Frobenius norm, summed in float64."""
    left = weight - product(b, a)
    if root is not None:
        return float(torch.linalg.norm(product(left.double(), root)))
    return float(torch.linalg.norm(left, dtype=torch.float64))


def squared_norm(matrix: Tensor) -> float:
    """Return ||W||^2 in the Frobenius norm: lines of memory in the matrix's own precision, their sum in float64.

    For float32 lines of some thousands that is exact to 1e-7, in a twentieth of the time of summing in float64.
    """
    lines = matrix.T if matrix.T.is_contiguous() else matrix
    return float(torch.linalg.vector_norm(lines, dim=1).double().square().sum())


def error_of(weight: Tensor, a: Tensor, b: Tensor) -> float:
    """Return ||W - B A|| of factors that `factors` computed without a root, mostly from their lengths alone.

    B A consists of whole directions of W, so ||W||^2 = ||W - B A||^2 + ||B A||^2, and ||B A||^2 is the sum over pairs
    of (|a_i| |b_i|)^2. Float32 gives that to 1e-6 of ||W||^2; if that would be visible, the difference itself is
    measured, which costs as much as the factors did.
    """
    total = squared_norm(weight)
    lengths = torch.linalg.vector_norm(a, dim=1).double() * torch.linalg.vector_norm(b, dim=0).double()
    left = total - float(lengths.square().sum())
    return left**0.5 if left >= TELLING * total else residual(weight, a, b)


def _short(weights: Tensor) -> Tensor:
    """Return the matrices, or their transposes if these have fewer rows."""
    return weights if weights.shape[-2] <= weights.shape[-1] else weights.mT


def _signed(vectors: Tensor) -> Tensor:
    """Return the same directions (columns), each with its largest entry positive."""
    largest = vectors.abs().argmax(0, keepdim=True)
    return vectors * vectors.gather(0, largest).sign()


def _balanced(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors of the same product, with the length of each pair shared evenly."""
    long_a, long_b = torch.linalg.norm(a, dim=1), torch.linalg.norm(b, dim=0)
    # A direction that is zero except for rounding stays small instead of being scaled up.
    long_a = long_a.clamp_min(float(long_a.max()) * 1e-8 or 1e-30)
    long_b = long_b.clamp_min(float(long_b.max()) * 1e-8 or 1e-30)
    scale = (long_a / long_b).sqrt()
    return a / scale[:, None], b * scale
