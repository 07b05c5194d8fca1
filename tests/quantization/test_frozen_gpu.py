"""Frozen layers on a GPU: bitsandbytes' own numbers, and the CPU's within rounding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from finhpc.quantization.frozen import FrozenLinear
from finhpc.quantization.per_vector import rounded
from finhpc.quantization.schemes import SCHEMES, freeze
from tests.gpu import CUDA, DEVICE, ON, needs_gpu
from tests.quantization.test_frozen import IN, OUT, inputs, product_and_gradient, theirs, weights

pytestmark = needs_gpu

WIDTHS = [(8, "int8"), (4, "nf4"), (8, "minmax"), (4, "minmax")]


def off(found: Tensor, wanted: Tensor) -> float:
    """How far apart they are, relative to the norm."""
    found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
    return float((found - wanted).norm() / wanted.norm())


def frozen(bits: int, scheme: str, dtype: torch.dtype, made_on: str) -> FrozenLinear:
    """The layer on `DEVICE` of a matrix quantised on another one."""
    rows, bias = weights()
    held = SCHEMES[scheme].tensors(rows.to(made_on), bits, "layer")
    moved = {key: value.to(DEVICE) for key, value in held.items()}
    return SCHEMES[scheme].frozen(moved, (OUT, IN), bias.to(DEVICE, dtype), bits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "scheme"), WIDTHS[:2])
def test_layers_are_bitsandbytes_own(bits: int, scheme: str, dtype: torch.dtype) -> None:
    rows, bias = (x.to(DEVICE) for x in weights())
    ours = freeze(rows, bias, bits, scheme, dtype, "layer").train()
    x = inputs(dtype).to(DEVICE)
    found, wanted = (product_and_gradient(layer, x) for layer in (ours, theirs(bits, dtype, ON).train()))
    tolerance = 1e-6 if dtype == torch.float32 else 4e-3
    assert off(found[0], wanted[0]) <= tolerance
    assert off(found[1], wanted[1]) <= tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4])
def test_minmax_layers_multiply_by_the_rounded_matrix(bits: int, dtype: torch.dtype) -> None:
    rows, bias = (x.to(DEVICE) for x in weights())
    matrix = rounded(rows, bits)
    assert torch.equal(matrix.cpu(), rounded(rows.cpu(), bits)), "the same weights anywhere"
    x = inputs(dtype).to(DEVICE)
    found = product_and_gradient(freeze(rows, bias, bits, "minmax", dtype, "layer"), x)
    wanted = product_and_gradient(lambda x: F.linear(x, matrix.to(dtype), bias.to(dtype)), x)
    assert torch.equal(found[0], wanted[0])
    assert off(found[1], wanted[1]) <= (1e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize(("bits", "scheme"), WIDTHS)
def test_a_matrix_quantised_on_the_cpu_is_the_same_here(bits: int, scheme: str) -> None:
    here, moved = (frozen(bits, scheme, torch.float32, on) for on in (ON, "cpu"))
    rows, bias = weights()
    plain = freeze(rows, bias, bits, scheme, torch.float32, "layer")
    assert off(moved.matrix(torch.float32), plain.matrix(torch.float32)) <= 1e-6
    assert off(here.matrix(torch.float32), plain.matrix(torch.float32)) <= 1e-2, "at ties another code may be chosen"
    x = inputs(torch.float32)
    found, wanted = product_and_gradient(moved.eval(), x.to(DEVICE)), product_and_gradient(plain.eval(), x)
    half = CUDA and scheme == "int8"  # its kernels give float16
    assert off(found[0], wanted[0]) <= (2e-3 if half else 1e-5)
    assert off(found[1], wanted[1]) <= 1e-5
