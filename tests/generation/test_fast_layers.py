"""Layers in their fast forms compute what the layers before them do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from finhpc.generation.fast_layers import KernelLinear, PackedLinear, use_fast_layers
from finhpc.generation.generator import tensor_bytes
from finhpc.lowrank.layers import LowRankLinear
from finhpc.models.constant import can_be_packed
from finhpc.quantization.minmax import MinMax, QuantizedLinear


def packed(out: int, into: int, bits: int, bias: bool) -> QuantizedLinear:
    torch.manual_seed(0)
    tensors = MinMax().tensors(torch.randn(out, into) + 0.3, bits, "w")
    return QuantizedLinear((out, into), bits, torch.randn(out) if bias else None, tensors).to(torch.bfloat16)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [1, 3, 200])
@pytest.mark.parametrize("out", [96, 101])
def test_kernels_compute_with_the_packed_weights(bits: int, rows: int, out: int) -> None:
    layer = packed(out, 64, bits, bias=rows == 3)
    weight, bias = layer.dequantized(), 0 if layer.bias is None else layer.bias.float()
    x = torch.randn(2, rows, 64).to(torch.bfloat16)
    exact = x.double() @ weight.double().T + bias
    model = nn.Sequential(layer)
    assert use_fast_layers(model)[f"kernel_{bits}"] == 1
    assert isinstance(model[0], KernelLinear)
    error = (model(x).double() - exact).norm() / exact.norm()
    assert error < 3e-3, "as near as a product of bfloat16 matrices"


def test_the_8_bit_kernel_takes_the_codes_over() -> None:
    layer = packed(512, 256, 8, bias=False)
    model, before = nn.Sequential(layer), tensor_bytes(layer)
    address = layer.weight.data_ptr()
    use_fast_layers(model)
    assert model[0].codes.data_ptr() == address
    assert tensor_bytes(model) <= 1.05 * before


@pytest.mark.parametrize("shift", [0, 8, 40])
def test_codes_lie_where_the_kernel_can_take_them(shift: int) -> None:
    """As in a safetensors file, which aligns to 8 bytes; the kernel ends the process for 5 rows of others."""
    layer = packed(96, 64, 8, bias=False)
    room = torch.empty(96 * 64 + 128, dtype=torch.uint8)
    begin = -room.data_ptr() % 64 + shift
    layer.weight = room[begin : begin + 96 * 64].view(96, 64, 1).copy_(layer.weight)
    exact, x = layer.dequantized(), torch.randn(8, 64).to(torch.bfloat16)
    model = nn.Sequential(layer)
    use_fast_layers(model)
    assert model[0].codes.data_ptr() % 64 == 0
    assert (model(x).double() - x.double() @ exact.double().T).norm() < 3e-3 * (x.double() @ exact.double().T).norm()


def test_layers_the_kernels_cannot_take_stay() -> None:
    """Of 40 columns the 8-bit kernel would end the process, or read on behind them."""
    layers = [packed(64, 40, 4, False), packed(40, 64, 8, False).float(), packed(32, 40, 8, False)]
    model = nn.Sequential(*layers)
    assert not any(use_fast_layers(model).values())
    assert list(model) == layers


def test_a_pair_is_multiplied_out_where_that_is_less_to_read() -> None:
    wide, narrow = LowRankLinear(1024, 1024, 600, True), LowRankLinear(1024, 1024, 64, True)
    wide_blocks, narrow_blocks = LowRankLinear(1024, 1024, 240, True, 4), LowRankLinear(1024, 1024, 120, True, 4)
    for layer in (wide, narrow, wide_blocks, narrow_blocks):
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
    model, x = nn.Sequential(wide, narrow, wide_blocks, narrow_blocks), torch.randn(3, 1024)
    expected = {0: wide(x).detach(), 2: wide_blocks(x).detach()}
    assert use_fast_layers(model)["merged"] == 2
    assert (model[1], model[3]) == (narrow, narrow_blocks)
    for i, outputs in expected.items():
        assert isinstance(model[i], PackedLinear)
        torch.testing.assert_close(model[i](x).detach(), outputs, rtol=1e-3, atol=1e-1)


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 3e-3), (torch.float32, 1e-6)])
@pytest.mark.parametrize("rows", [1, 7, 64, 300])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_packed_weights_compute_as_plain_ones(kind: str, rows: int, dtype: torch.dtype, most: float) -> None:
    torch.manual_seed(0)
    layer: Any = nn.Linear(96, 200, bias=rows != 7) if kind == "linear" else Conv1D(200, 96)
    nn.init.normal_(layer.weight)
    layer = layer.to(dtype)
    if not can_be_packed(layer.weight):
        pytest.skip("no products of this type on this processor")
    rows_of_weight = layer.weight if kind == "linear" else layer.weight.T
    x = torch.randn(1, rows, 96).to(dtype)
    exact = x.double() @ rows_of_weight.double().T + (0 if layer.bias is None else layer.bias.double())
    model, before = nn.Sequential(layer), tensor_bytes(layer)
    assert use_fast_layers(model)["packed"] == 1
    assert isinstance(model[0], PackedLinear)
    out = model(x)
    assert (out.shape, out.dtype) == ((1, rows, 200), dtype)
    assert (out.double() - exact).norm() < most * exact.norm(), "as near as a product of such matrices"
    assert tensor_bytes(model) == before


def test_other_layers_are_not_packed() -> None:
    layers = [nn.Linear(64, 32).half(), nn.Embedding(10, 64).to(torch.bfloat16), nn.LayerNorm(64).to(torch.bfloat16)]
    assert not any(use_fast_layers(nn.Sequential(*layers)).values())
