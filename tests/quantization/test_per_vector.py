"""The per-vector quantiser: its grid, its error, its bytes."""

from __future__ import annotations

import pytest
import torch

from finhpc.errors import NonFiniteError
from finhpc.quantization.per_vector import dequantize, pack_bits, packed_columns, quantize, rounded, unpack_bits


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Rows of very different sizes, some far from zero."""
    generator = torch.Generator().manual_seed(seed)
    size = 10.0 ** torch.randint(-6, 4, (rows, 1), generator=generator)
    centre = torch.randint(0, 3, (rows, 1), generator=generator)
    return size * (torch.randn(rows, columns, generator=generator) + centre)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_codes_are_those_of_the_definition(bits: int) -> None:
    weight = torch.tensor([[-1.0, 0.0, 0.26, 2.0], [5.0, 5.0, 5.0, 5.0]])
    codes, scale, zero = quantize(weight, bits)
    last = 2**bits - 1
    assert zero.tolist() == [-1.0, 5.0]
    assert scale.tolist() == pytest.approx([3.0 / last, 0.0])
    assert codes[0].tolist() == [0, round(last / 3), round(1.26 * last / 3), last]
    assert codes[1].tolist() == [0, 0, 0, 0]
    assert codes.dtype == torch.uint8


@pytest.mark.parametrize("bits", [8, 4])
def test_no_element_is_further_away_than_half_a_step(bits: int) -> None:
    weight = matrix(60, 257)
    vectors = quantize(weight, bits)
    error = (dequantize(vectors).double() - weight.double()).abs()
    float32 = 2.0**-23 * weight.double().abs().amax(1, keepdim=True)
    assert (error <= vectors.scale.double()[:, None] / 2 * (1 + 1e-4) + float32).all()
    assert error.max() > 0, "the bound must be put to a test"


@pytest.mark.parametrize("bits", [8, 4])
def test_the_smallest_and_the_largest_element_are_kept(bits: int) -> None:
    weight = matrix(60, 257)
    again = dequantize(quantize(weight, bits))
    assert torch.equal(again.amin(1), weight.amin(1))
    assert ((again.amax(1) - weight.amax(1)).abs() <= 1e-6 * weight.abs().amax(1)).all()


def test_constant_rows_are_exact() -> None:
    weight = torch.tensor([[0.0] * 5, [-3.25] * 5, [1e-30] * 5])
    for bits in (8, 4):
        assert torch.equal(dequantize(quantize(weight, bits)), weight)
        assert torch.equal(rounded(weight, bits), weight)


def test_a_range_that_float32_cannot_hold_is_refused() -> None:
    with pytest.raises(NonFiniteError, match="too far apart"):
        quantize(torch.tensor([[-3e38, 0.0, 3e38]]), 8)


@pytest.mark.parametrize("bits", [8, 4])
def test_training_rounds_to_the_bits_an_export_holds(bits: int) -> None:
    weight = matrix(64, 100)
    assert torch.equal(rounded(weight, bits), dequantize(quantize(weight, bits)))
    turned = weight.T.contiguous().T  # as a Conv1D stores it
    assert torch.equal(rounded(turned, bits), rounded(weight, bits))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_are_quantised_in_float32(dtype: torch.dtype) -> None:
    weight = torch.randn(8, 40, generator=torch.Generator().manual_seed(1)).to(dtype)
    found, expected = quantize(weight, 8), quantize(weight.float(), 8)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("columns", [1, 2, 7, 8, 129])
def test_packing_is_exact(columns: int) -> None:
    codes = torch.randint(0, 16, (3, 5, columns), generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    packed = pack_bits(codes, 4)
    assert packed.dtype == torch.uint8
    assert packed.shape == (3, 5, packed_columns(columns, 4)) == (3, 5, -(-columns // 2))
    assert torch.equal(unpack_bits(packed, 4, columns), codes)
    assert torch.equal(unpack_bits(pack_bits(codes, 8), 8, columns), codes)


def test_two_codes_a_byte_the_first_one_low() -> None:
    codes = torch.tensor([[1, 2, 15]], dtype=torch.uint8)
    assert pack_bits(codes, 4).tolist() == [[0x21, 0x0F]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_matrix_that_is_not_finite_is_refused_by_name(bad: float) -> None:
    weight = torch.zeros(5, 4)
    weight[3, 1] = bad
    with pytest.raises(
        NonFiniteError, match=r"h\.0\.attn holds NaN or infinity.* in 1 of its 5 rows; the first is row 3"
    ):
        quantize(weight, 8, "h.0.attn")
