"""Packed layers: what they compute, what they keep in memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from finhpc.lowrank.layers import LowRankEmbedding, LowRankLinear
from finhpc.quantization.minmax import MinMax, QuantizedEmbedding, QuantizedLinear, QuantizedMatrix, replace
from finhpc.quantization.per_vector import rounded


def fill(layer: QuantizedMatrix, matrix: torch.Tensor) -> None:
    layer.load_state_dict(MinMax().tensors(matrix, layer.bits, "layer"), strict=False)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_linear_layer_computes_with_the_rounded_matrix(bits: int) -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(7, 5), torch.randn(7), torch.randn(2, 3, 5)
    layer = QuantizedLinear((7, 5), bits, bias)
    fill(layer, weight)
    assert torch.equal(layer.dequantized(), rounded(weight, bits))
    assert torch.equal(layer(x), F.linear(x, rounded(weight, bits), bias))


@pytest.mark.parametrize("bits", [8, 4])
def test_an_embedding_unpacks_the_rows_asked_for(bits: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(11, 5)
    layer = QuantizedEmbedding(11, 5, bits)
    fill(layer, weight)
    tokens = torch.tensor([[0, 10], [3, 3]])
    assert torch.equal(layer(tokens), rounded(weight, bits)[tokens])


@pytest.mark.parametrize(("bits", "row"), [(8, 33), (4, 17)])
def test_what_stays_in_memory_is_packed(bits: int, row: int) -> None:
    layer = QuantizedLinear((10, 33), bits, None)
    held = sum(t.numel() * t.element_size() for t in [*layer.parameters(), *layer.buffers()])
    assert held == 10 * row + 10 * 8


@pytest.mark.parametrize("bits", [8, 4])
def test_every_layer_of_a_model_is_replaced(bits: int) -> None:
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(6, 4, bias=False),
            "conv": Conv1D(4, 6),
            "embedding": nn.Embedding(9, 6),
            "norm": nn.LayerNorm(6),
            "pair": LowRankLinear(6, 4, 2, bias=True),
            "low": LowRankEmbedding(9, 6, 2),
        }
    )
    matrices = {  # (out, in), or (tokens, dim)
        "linear": model["linear"].weight,
        "conv": model["conv"].weight.T,
        "embedding": model["embedding"].weight,
        "pair.A": model["pair"].A.weight,
        "pair.B": model["pair"].B.weight,
        "low.A": model["low"].A.weight,
        "low.B": model["low"].B.weight,
    }
    replace(model, bits)
    packed = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedMatrix)}
    assert packed.keys() == matrices.keys()
    for name, layer in packed.items():
        fill(layer, matrices[name].detach())
        assert torch.equal(layer.dequantized(), rounded(matrices[name].detach().contiguous(), bits)), name
    assert isinstance(model["norm"], nn.LayerNorm)
    x = torch.randn(3, 6)
    assert model["conv"](x).shape == model["pair"](x).shape == (3, 4)
    assert model["conv"].bias is not None
    assert model["linear"].bias is None
    assert model["low"](torch.tensor([1, 8])).shape == (2, 6)


def test_layers_on_the_meta_device_are_replaced_there() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 2))
    replace(model, 8)
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def test_scales_stay_float32_when_the_model_is_cast() -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, 4)
    layer = QuantizedEmbedding(5, 4, 8)
    fill(layer, weight)
    layer.to(torch.bfloat16)
    assert layer.scale.dtype == torch.float32
    assert torch.equal(layer.dequantized(), rounded(weight, 8))
    assert layer(torch.tensor([1])).dtype == torch.bfloat16
    layer.to("cpu")
    assert layer(torch.tensor([1])).dtype == torch.bfloat16


def test_the_product_of_the_factors_is_the_whole_layer() -> None:
    torch.manual_seed(0)
    pair, low = LowRankLinear(6, 5, 2, bias=True), LowRankEmbedding(7, 5, 2)
    x, tokens = torch.randn(3, 6), torch.tensor([0, 6, 2])
    product = pair.product(pair.A.weight, pair.B.weight)
    torch.testing.assert_close(F.linear(x, product, pair.B.bias), pair(x))
    torch.testing.assert_close(F.embedding(tokens, low.product(low.A.weight, low.B.weight)), low(tokens))
