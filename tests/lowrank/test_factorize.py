"""Best factors: against torch's full SVD in float64, plainly and for a layer's outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from finhpc.lowrank.blas import gram
from finhpc.lowrank.factorize import (
    error_of,
    factors,
    residual,
    solved,
    spectra,
    squared_norm,
    truncated_svd,
    whitening_root,
)

SHAPES = [(60, 90), (90, 60), (64, 64)]
FALLS = {
    "flat": lambda n: torch.ones(n),
    "slow": lambda n: (1 + torch.arange(n)) ** -0.5,
    "fast": lambda n: 0.6 ** torch.arange(n),  # down to 1e-13 of the largest
    "step": lambda n: torch.where(torch.arange(n) < n // 3, 1.0, 1e-5),
    "one": lambda n: torch.where(torch.arange(n) < 1, 1.0, 0.0),
}


def matrix(shape: tuple[int, int], fall: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    n = min(shape)
    left, right = (torch.linalg.qr(torch.randn(size, n, generator=generator, dtype=torch.float64)).Q for size in shape)
    return (left * FALLS[fall](n).double() @ right.T).float()


@pytest.mark.parametrize("fall", FALLS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_error_is_the_smallest_there_is(shape: tuple[int, int], fall: str) -> None:
    weight = matrix(shape, fall)
    singular = torch.linalg.svdvals(weight.double())
    norm = float(torch.linalg.norm(weight.double()))
    for rank in (1, min(shape) // 3, min(shape) - 1, min(shape)):
        a, b = truncated_svd(weight, rank)
        assert a.shape == (rank, shape[1])
        assert b.shape == (shape[0], rank)
        optimum = float(singular[rank:].square().sum().sqrt())
        error = float(torch.linalg.norm(weight.double() - b.double() @ a.double()))
        assert error <= 1.001 * optimum + 1e-6 * norm, rank


@pytest.mark.parametrize("fall", FALLS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_error_told_is_the_one_measured(shape: tuple[int, int], fall: str) -> None:
    weight = matrix(shape, fall)
    norm = float(torch.linalg.norm(weight.double()))
    for rank in (1, 9, min(shape)):
        a, b = truncated_svd(weight, rank)
        measured = float(torch.linalg.norm(weight.double() - b.double() @ a.double()))
        assert error_of(weight, a, b) == pytest.approx(measured, rel=1e-4, abs=1e-6 * norm)


@pytest.mark.parametrize("turned", [False, True])
def test_a_squared_norm_is_as_good_as_one_summed_in_float64(turned: bool) -> None:
    weight = torch.randn(3000, 700, generator=torch.Generator().manual_seed(0))
    weight[:, 0] *= 1000  # among small ones
    exact = float(weight.double().square().sum())
    assert squared_norm(weight.T if turned else weight) == pytest.approx(exact, rel=1e-6)


def test_same_shaped_matrices_are_solved_together_and_the_spectrum_is_the_svds() -> None:
    weights = torch.stack([matrix((40, 70), fall) for fall in ("flat", "slow", "fast")])
    for weight, spectrum in zip(weights, spectra(weights), strict=True):
        singular = torch.linalg.svdvals(weight.double())
        torch.testing.assert_close(spectrum.values, singular, rtol=1e-6, atol=2e-8 * float(singular[0]))
        assert spectrum.optimum(7) == pytest.approx(float(singular[7:].norm()), rel=1e-6)


def test_in_float32_singular_values_are_nearly_as_good_and_small_ones_are_not_lost() -> None:
    weights = torch.stack([matrix((70, 40), fall) for fall in FALLS])
    for weight, spectrum in zip(weights, spectra(weights, torch.float32), strict=True):
        singular = torch.linalg.svdvals(weight.double())
        torch.testing.assert_close(spectrum.values, singular, rtol=3e-3, atol=1e-5 * float(singular[0]))


def test_float64_is_taken_where_float32_would_cost_precision() -> None:
    weights = torch.stack([matrix((70, 40), fall) for fall in ("flat", "slow", "fast", "step")])
    found = solved(weights, lambda i, spectrum: (5, 5, 12, 14)[i])
    assert [rank for _, rank in found] == [5, 5, 12, 14]
    assert [spectrum.directions.dtype for spectrum, _ in found] == [torch.float32] * 2 + [torch.float64] * 2
    for weight, (spectrum, rank) in zip(weights, found, strict=True):
        torch.testing.assert_close(factors(weight, spectrum, rank), truncated_svd(weight, rank))


def test_factors_are_balanced_and_their_signs_fixed() -> None:
    for shape in SHAPES:
        weight = matrix(shape, "slow")
        a, b = truncated_svd(weight, 9)
        torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0), rtol=1e-5, atol=0)
        torch.testing.assert_close(a.norm(dim=1) ** 2, torch.linalg.svdvals(weight)[:9], rtol=1e-4, atol=0)
        side = b if shape[0] <= shape[1] else a.T
        assert (side.gather(0, side.abs().argmax(0, keepdim=True)) > 0).all()


def test_a_gram_matrix_in_blocks_is_the_whole_ones_lower_half() -> None:
    rows = torch.randn(300, 5000, generator=torch.Generator().manual_seed(0))
    expected = (rows.double() @ rows.double().T).tril()
    torch.testing.assert_close(gram(rows).tril(), expected, rtol=1e-12, atol=1e-9)


def inputs(features: int, count: int = 400, seed: int = 3) -> Tensor:
    """Correlated inputs (count, features): some directions thousands of times stronger than others."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(features, features, generator=generator, dtype=torch.float64) / features**0.5
    scale = torch.logspace(1.5, -1.5, features, dtype=torch.float64)
    return torch.randn(count, features, generator=generator, dtype=torch.float64) * scale @ mixed


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 13, 40])
def test_whitened_factors_are_the_best_for_the_outputs(shape: tuple[int, int], rank: int) -> None:
    weight, x = matrix(shape, "slow"), inputs(shape[1])
    root, damping = whitening_root(x.T @ x / len(x))
    assert damping == 0
    a, b = factors(weight, spectra([weight.double() @ root])[0], rank, root)

    def output_error(approximation: Tensor) -> float:
        return float(torch.linalg.norm(x @ (weight.double() - approximation).T)) / len(x) ** 0.5

    # The closed form (SVD-LLM): truncate W S by a full SVD and multiply back by S^-1.
    left, values, right = torch.linalg.svd(weight.double() @ root, full_matrices=False)
    best = (left[:, :rank] * values[:rank]) @ right[:rank] @ torch.linalg.inv(root)
    error = output_error(b.double() @ a.double())
    assert error <= 1.001 * output_error(best) + 1e-6 * float(values.norm())
    assert error == pytest.approx(float(values[rank:].norm()), rel=1e-3)
    assert residual(weight, a, b, root) == pytest.approx(error, rel=1e-3)
    torch.testing.assert_close((b @ a).double(), best, rtol=1e-3, atol=1e-4 * float(weight.norm()))
    plain_a, plain_b = truncated_svd(weight, rank)
    assert error < 0.95 * output_error(plain_b.double() @ plain_a.double())


@pytest.mark.parametrize("shape", SHAPES)
def test_at_full_rank_a_whitened_weight_is_itself(shape: tuple[int, int]) -> None:
    weight, x = matrix(shape, "slow"), inputs(shape[1])
    root, _ = whitening_root(x.T @ x / len(x))
    a, b = factors(weight, spectra([weight.double() @ root])[0], min(shape), root)
    assert residual(weight, a, b) <= 1e-5 * float(weight.norm())


@pytest.mark.parametrize("shape", SHAPES)
def test_inputs_that_leave_directions_unseen_are_damped_and_said(shape: tuple[int, int]) -> None:
    weight, x = matrix(shape, "slow"), inputs(shape[1], count=20)
    root, damping = whitening_root(x.T @ x / len(x))
    assert 0 < damping <= 1e-6
    a, b = factors(weight, spectra([weight.double() @ root])[0], 30, root)
    seen = x @ (weight.double() - b.double() @ a.double()).T
    assert float(seen.norm()) <= 1e-3 * float((x @ weight.double().T).norm()), "20 inputs span 20 directions"


def test_a_moment_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="not positive"):
        whitening_root(torch.zeros(4, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="not positive"):
        whitening_root(torch.full((4, 4), float("nan"), dtype=torch.float64))


def test_a_moment_that_is_singular_but_for_rounding_is_damped() -> None:
    assert whitening_root(torch.diag(torch.tensor([1.0, 1e-8], dtype=torch.float64)))[1] == 0
    assert whitening_root(torch.diag(torch.tensor([1.0, 1e-13], dtype=torch.float64)))[1] == 1e-9
