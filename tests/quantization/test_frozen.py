"""Frozen layers against bitsandbytes' own: the same bits from the same input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from finhpc.quantization.schemes import freeze

OUT, IN = 96, 64


def weights() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(OUT, IN, generator=draw), torch.randn(OUT, generator=draw)


def inputs(dtype: torch.dtype) -> Tensor:
    """Rows with a column beyond 6, which LLM.int8 computes in float."""
    x = torch.randn(10, IN, generator=torch.Generator().manual_seed(1))
    x[3, 5] = 9.0
    return x.to(dtype)


def theirs(bits: int, dtype: torch.dtype, device: str = "cpu") -> Any:
    import bitsandbytes as bnb

    rows, bias = weights()
    if bits == 8:
        layer: Any = bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=False, threshold=6.0)
        layer.weight = bnb.nn.Int8Params(rows, requires_grad=False, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(IN, OUT, compute_dtype=dtype, compress_statistics=True, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(rows, requires_grad=False, quant_type="nf4", compress_statistics=True)
    layer.bias = torch.nn.Parameter(bias.to(dtype), requires_grad=False)
    return layer.to(device)


def product_and_gradient(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    (grad,) = torch.autograd.grad(y, x, torch.linspace(-1, 1, y.numel()).view(y.shape).to(y))
    return y.detach(), grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("bits", "scheme", "training"),
    [(8, "int8", True), (8, "int8", False), (4, "nf4", True)],  # NF4 in evaluation: packed anew for CPUs, in bfloat16
)
def test_single_layers_are_bitsandbytes_own(bits: int, scheme: str, training: bool, dtype: torch.dtype) -> None:
    rows, bias = weights()
    ours = freeze(rows, bias, bits, scheme, dtype, "layer").train(training)
    found = product_and_gradient(ours, inputs(dtype))
    wanted = product_and_gradient(theirs(bits, dtype).train(training), inputs(dtype))
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])
