"""Training with rounded weights: what is computed with, what is trained, what it is called."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from finhpc.lowrank.layers import LowRankEmbedding, LowRankLinear
from finhpc.models.derived import DerivedWeights
from finhpc.quantization.fake import round_weights
from finhpc.quantization.per_vector import rounded
from finhpc.settings.training import Precision


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
    DerivedWeights(model, "fp32", bits).set()
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


def test_the_trained_parameters_stay_and_are_used_again_afterwards() -> None:
    model = small()
    before, weight = dict(model.named_parameters()), model["linear"].weight
    derived = DerivedWeights(model, "fp32", 4)
    derived.set()
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is parameter for name, parameter in before.items())
    assert model["linear"].weight is not weight
    derived.drop()
    assert model["linear"].weight is weight


def test_the_gradient_passes_straight_through() -> None:
    model, plain = small(), small()
    DerivedWeights(model, "fp32", 4).set()
    round_weights(plain, 4)
    x = torch.randn(5, 6)
    for each in (model, plain):
        (each["pair"](x).square().sum() + each["conv"](x).square().sum()).backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name in ("pair.A.weight", "pair.B.weight", "pair.B.bias", "conv.weight"):
        assert torch.equal(grads[name], plain.get_parameter(name).grad), name  # type: ignore[arg-type]


def test_a_changed_weight_is_rounded_anew_in_the_next_step() -> None:
    layer = nn.Linear(6, 4, bias=False)
    derived, weight = DerivedWeights(layer, "fp32", 8), layer.weight
    with derived.once():
        assert torch.equal(layer.weight, rounded(weight.detach(), 8))
        with torch.no_grad():
            weight.mul_(-2)
        before = layer.weight
        with derived.once():
            assert layer.weight is before, "all passes of a step use the same"
    with derived.once():
        assert torch.equal(layer.weight, rounded(weight.detach(), 8))


@pytest.mark.parametrize("precision", ["bf16", "bf16-weights"])
def test_a_cast_has_the_gradients_of_autocast_over_two_passes(precision: Precision) -> None:
    model, plain, x = small(), small(), torch.randn(5, 6)
    with DerivedWeights(model, precision).once():
        assert model["conv"].weight.dtype == model["pair"].A.weight.dtype == torch.bfloat16
        assert model["norm"].weight.dtype == (torch.bfloat16 if precision == "bf16-weights" else torch.float32)
        for _ in range(2):
            (model["pair"](x.bfloat16()).square().sum() + model["conv"](x.bfloat16()).square().sum()).backward()
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            (plain["pair"](x).square().sum() + plain["conv"](x).square().sum()).backward()
    for name in ("pair.A.weight", "pair.B.weight", "conv.weight"):
        ours, theirs = model.get_parameter(name).grad, plain.get_parameter(name).grad
        assert ours is not None
        assert ours.dtype == torch.float32
        assert theirs is not None
        assert (ours - theirs).norm() < 1e-2 * theirs.norm(), name


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
    DerivedWeights(layer, "fp32", 4).set()
    assert layer(torch.ones(1, 6)).isnan().any(), "so that training stops, as it does without rounding"
