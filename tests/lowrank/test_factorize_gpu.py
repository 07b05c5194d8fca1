"""Best factors on a GPU, same-shaped matrices together: against torch's full SVD in float64 on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from finhpc.lowrank.blas import product
from finhpc.lowrank.factorize import error_of, factors, residual, solved, spectra, whitening_root
from tests.gpu import DEVICE, needs_gpu
from tests.lowrank.test_factorize import FALLS, inputs, matrix

pytestmark = needs_gpu

SHAPES = [(160, 256), (256, 160), (192, 192)]


def error(weight: Tensor, a: Tensor, b: Tensor) -> float:
    return float(torch.linalg.norm(weight.double() - b.cpu().double() @ a.cpu().double()))


@pytest.mark.parametrize("rank", [1, 50, 150])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_error_is_the_smallest_there_is(shape: tuple[int, int], rank: int) -> None:
    weights = [matrix(shape, fall, seed) for seed, fall in enumerate(FALLS)]
    here = [weight.to(DEVICE) for weight in weights]
    for weight, mine, (spectrum, found) in zip(weights, here, solved(here, lambda *_: rank), strict=True):
        a, b = factors(mine, spectrum, found)
        assert a.device.type == DEVICE.type
        optimum = float(torch.linalg.svdvals(weight.double())[rank:].norm())
        norm = float(weight.double().norm())
        assert error(weight, a, b) <= 1.001 * optimum + 1e-6 * norm
        assert spectrum.optimum(rank) == pytest.approx(optimum, rel=1e-3, abs=1e-6 * norm)
        assert error_of(mine, a, b) == pytest.approx(error(weight, a, b), rel=1e-3, abs=1e-6 * norm)


@pytest.mark.parametrize("shape", SHAPES)
def test_whitened_factors_are_the_best_for_the_outputs(shape: tuple[int, int]) -> None:
    weight, x, rank = matrix(shape, "slow"), inputs(shape[1], 1000), 40
    mine, moment = weight.to(DEVICE), (x.T @ x / len(x)).to(DEVICE)
    root, damping = whitening_root(moment)
    assert damping == 0
    a, b = factors(mine, spectra([product(mine.double(), root)])[0], rank, root)
    singular = torch.linalg.svdvals(weight.double() @ root.cpu())
    optimum = float(singular[rank:].norm())
    left = (weight.double() - b.cpu().double() @ a.cpu().double()) @ root.cpu()
    assert float(left.norm()) <= 1.001 * optimum + 1e-6 * float(singular.norm())
    assert residual(mine, a, b, root) == pytest.approx(float(left.norm()), rel=1e-3)
