"""Products by OpenBLAS: against torch's, whichever way a matrix lies in memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from finhpc.lowrank import blas


def matrix(n: int, k: int, dtype: torch.dtype, lies: str) -> Tensor:
    found = torch.randn(n, k, generator=torch.Generator().manual_seed(n * k), dtype=dtype)
    if lies == "by columns":
        return found.T.contiguous().T
    if lies == "apart":
        return torch.stack([found, found], dim=-1)[..., 0]
    return found


LIES = ["by rows", "by columns", "apart"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lies", LIES)
def test_a_gram_matrix_is_the_lower_half_of_x_x_transposed(dtype: torch.dtype, lies: str) -> None:
    rows = matrix(30, 5000, torch.float32, lies)
    expected = (rows.double() @ rows.double().T).tril()
    rtol = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(blas.gram(rows, dtype).double(), expected, rtol=rtol, atol=rtol * 5000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("left", LIES)
@pytest.mark.parametrize("right", LIES)
def test_a_product_is_torchs_and_lies_by_rows(dtype: torch.dtype, left: str, right: str) -> None:
    one, two = matrix(20, 33, dtype, left), matrix(33, 17, dtype, right)
    found = blas.product(one, two)
    assert found.is_contiguous()
    torch.testing.assert_close(found, one @ two)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eigenvectors_come_from_the_lower_half_smallest_first(dtype: torch.dtype) -> None:
    rows = matrix(25, 60, dtype, "by rows")
    whole = rows @ rows.T
    values, vectors = blas.eigh(whole.tril())
    assert (values.diff() >= 0).all()
    torch.testing.assert_close(vectors * values @ vectors.T, whole, rtol=1e-4, atol=1e-4)


def test_threads_are_torchs() -> None:
    before = torch.get_num_threads()
    blas.product(torch.ones(2, 2), torch.ones(2, 2))
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with blas._threads():
                held = [pool["num_threads"] for pool in blas._pools().info() if pool["internal_api"] == "openblas"]
            assert held
            assert set(held) == {threads}
    finally:
        torch.set_num_threads(before)
