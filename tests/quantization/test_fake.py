"""Training with rounded weights: what is computed with, what is trained, what it is called."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from finhpc.lowrank.layers import LowRankEmbedding, LowRankLinear
from finhpc.quantization.fake import fake_quantize, plain_name, round_weights
from finhpc.quantization.per_vector import rounded


def small() -> nn.ModuleDict:
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(6, 4),
            "conv": Conv1D(4, 6),
            "norm": nn.LayerNorm(6),
            "pair": LowRankLinear(6, 4, 2, bias=True),
            "low": LowRankEmbedding(9, 6, 2),
        }
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("bits", [8, 4])
def test_modules_compute_with_rounded_matrices(bits: int) -> None:
    model, plain = small(), small()
    fake_quantize(model, bits)
    for name in ("linear.weight", "pair.A.weight", "pair.B.weight", "low.A.weight", "low.B.weight"):
        module, _, parameter = name.rpartition(".")
        assert torch.equal(getattr(model.get_submodule(module), parameter), rounded(plain.get_parameter(name), bits)), (
            name
        )
    assert torch.equal(model["conv"].weight, rounded(plain["conv"].weight.T, bits).T), "an output is a column"
    assert torch.equal(model["linear"].bias, plain["linear"].bias)
    assert torch.equal(model["norm"].weight, plain["norm"].weight)
    round_weights(plain, bits)
    x = torch.randn(3, 6)
    for name in ("linear", "conv", "pair"):
        assert torch.equal(model[name](x), plain[name](x)), name
    assert torch.equal(model["low"](torch.tensor([3])), plain["low"](torch.tensor([3])))


def test_the_trained_parameters_keep_their_names_and_are_the_same_objects() -> None:
    model = small()
    before = dict(model.named_parameters())
    fake_quantize(model, 4)
    after = {plain_name(name): parameter for name, parameter in model.named_parameters()}
    assert after.keys() == before.keys()
    assert all(after[name] is parameter for name, parameter in before.items())
    assert plain_name("A.parametrizations.weight.original") == "A.weight"
    assert plain_name("h.0.attn.bias") == "h.0.attn.bias"


def test_the_gradient_passes_straight_through() -> None:
    model, plain = small(), small()
    fake_quantize(model, 4)
    round_weights(plain, 4)
    x = torch.randn(5, 6)
    for each in (model, plain):
        (each["pair"](x).square().sum() + each["conv"](x).square().sum()).backward()
    grads = {plain_name(name): parameter.grad for name, parameter in model.named_parameters()}
    for name in ("pair.A.weight", "pair.B.weight", "pair.B.bias", "conv.weight"):
        assert torch.equal(grads[name], plain.get_parameter(name).grad), name  # type: ignore[arg-type]


def test_a_changed_weight_is_rounded_anew() -> None:
    layer = nn.Linear(6, 4, bias=False)
    weight = layer.weight
    fake_quantize(layer, 8)
    with torch.no_grad():
        weight.mul_(-2)
    assert torch.equal(layer.weight, rounded(weight.detach(), 8))


def test_fake_quantising_twice_rounds_once() -> None:
    model, again = small(), small()
    fake_quantize(model, 4)
    fake_quantize(again, 4)
    fake_quantize(again, 4)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in again.named_parameters()]


def test_a_tied_matrix_is_rounded_once() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(90, 60), "head": nn.Linear(60, 90, bias=False)})
    model["head"].weight = model["embedding"].weight
    torch.manual_seed(0)
    with torch.no_grad():
        model["head"].weight.copy_(torch.randn(90, 60) + 3)
    expected = rounded(model["head"].weight.detach().clone(), 4)
    assert not torch.equal(rounded(expected, 4), expected), "twice must show"
    round_weights(model, 4)
    assert torch.equal(model["head"].weight, expected)
    assert model["head"].weight is model["embedding"].weight


def test_a_weight_that_is_not_finite_makes_the_output_so() -> None:
    layer = nn.Linear(6, 4, bias=False)
    with torch.no_grad():
        layer.weight[1, 2] = float("inf")
    fake_quantize(layer, 4)
    assert layer(torch.ones(1, 6)).isnan().any(), "so that training stops, as it does without rounding"
