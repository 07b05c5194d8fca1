"""Products with packed weights."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from finhpc.models.constant import PACKED, can_be_packed, filled, pack, product


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 3e-3), (torch.float32, 1e-6)])
def test_a_packed_weight_gives_the_same_product(dtype: torch.dtype, most: float) -> None:
    torch.manual_seed(0)
    weight, bias, x = (torch.randn(*shape).to(dtype) for shape in ((24, 40), (24,), (2, 3, 40)))
    if not can_be_packed(weight):
        pytest.skip("no products of this type on this processor")
    packed = pack(weight)
    assert packed.layout == PACKED
    exact = linear(x.double(), weight.double(), bias.double())
    with torch.inference_mode():
        assert (product(x, packed, bias).double() - exact).norm() < most * exact.norm()
        assert torch.equal(product(x, weight, bias), linear(x, weight, bias)), "an unpacked one, too"


def test_what_cannot_be_packed_stays() -> None:
    weight = torch.randn(3, 4, dtype=torch.float64)
    assert pack(weight) is weight
    assert product(torch.ones(2, 4, dtype=torch.float64), weight).shape == (2, 3)


def test_few_numbers_of_rows_occur() -> None:
    counts = [filled(rows) for rows in range(1, 600)]
    assert all(0 <= count - rows < 32 for rows, count in enumerate(counts, 1))
    assert counts[:8] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert len(set(counts)) < 50
