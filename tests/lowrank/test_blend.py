"""Method 3's layer: dense at alpha 1, low-rank at 0 and then nothing more, a line between."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from finhpc.lowrank.blend import BlendEmbedding, BlendLinear, alpha_at, blend_in, set_alpha
from finhpc.lowrank.layers import LowRankEmbedding, LowRankLinear
from finhpc.models.derived import DerivedWeights
from finhpc.settings.pretrain import Method


def made(trainable: bool = True) -> nn.Sequential:
    """An embedding and a linear layer, blended."""
    torch.manual_seed(0)
    model = nn.Sequential(LowRankEmbedding(20, 6, 3), LowRankLinear(6, 5, 2, bias=True), nn.Linear(5, 4))
    blend_in(model, trainable)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def parts(model: nn.Sequential, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What the dense and the low-rank model give."""
    embedding, linear, last = model
    dense = F.linear(F.embedding(tokens, embedding.W), linear.W, linear.B.bias)
    low = F.linear(embedding.A(tokens) @ embedding.B.weight.T, linear.B.weight @ linear.A.weight, linear.B.bias)
    return last(dense), last(low)


TOKENS = torch.arange(12).reshape(3, 4)


def test_the_ends_are_the_dense_and_the_low_rank_model() -> None:
    model = made()
    dense, low = parts(model, TOKENS)
    set_alpha(model.modules(), 1.0)
    assert torch.equal(model(TOKENS), dense)
    set_alpha(model.modules(), 0.0)
    torch.testing.assert_close(model(TOKENS), low)


def test_between_the_outputs_and_gradients_are_mixed() -> None:
    torch.manual_seed(1)
    layer, x = BlendLinear(6, 5, 2, bias=True), torch.randn(3, 6)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    set_alpha([layer], 0.25)
    mixed = F.linear(x, 0.25 * layer.W + 0.75 * layer.B.weight @ layer.A.weight, layer.B.bias)
    torch.testing.assert_close(layer(x), mixed)
    ours = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    theirs = torch.autograd.grad(mixed.square().sum(), list(layer.parameters()))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("bits", [16, 4])
def test_at_0_w_is_gone_and_costs_nothing(bits: int) -> None:
    model = made()
    plain = LowRankLinear(6, 5, 2, bias=True)
    plain.load_state_dict({name: value for name, value in model[1].state_dict().items() if name != "W"})
    held = {id(p) for name, p in model.named_parameters() if ".W" in name}
    assert len(held) == 2
    gone = set_alpha(model.modules(), 0.0)
    assert {id(parameter) for parameter in gone} == held
    assert not [name for name, _ in model.named_parameters() if "W" in name]
    assert set_alpha(model.modules(), 0.0) == []
    if bits < 16:
        DerivedWeights(model, "fp32", bits).set()
        DerivedWeights(plain, "fp32", bits).set()
    x = torch.randn(7, 6)
    assert torch.equal(model[1](x), plain(x))
    counts = []
    for layer in (model[1], plain):
        with FlopCounterMode(display=False) as counter:
            layer(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 2 * 7 * 2 * (6 + 5)


def test_a_frozen_w_has_no_gradient() -> None:
    model = made(trainable=False)
    set_alpha(model.modules(), 0.5)
    model(TOKENS).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is None} == {"0.W", "1.W"}


def test_alpha_is_a_function_of_the_step() -> None:
    linear = Method(kind="blend", blend_start=0.8, blend_share=0.5)
    assert [alpha_at(linear, step, 10) for step in range(1, 8)] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0, 0, 0])
    assert alpha_at(linear, 5, 10) == alpha_at(linear, 10, 10) == 0.0
    assert linear.blend_steps(10) == 5
    cosine = Method(kind="blend", blend_start=1.0, blend_share=1.0, blend_schedule="cosine")
    values = [alpha_at(cosine, step, 5) for step in range(1, 6)]
    assert values == pytest.approx([1, 0.853553, 0.5, 0.146447, 0], abs=1e-6)
    assert values[-1] == 0.0, "the last step is taken without W"


def test_an_embedding_follows_its_dense_twin_under_autocast() -> None:
    embedding = BlendEmbedding(20, 6, 3)
    for parameter in embedding.parameters():
        nn.init.normal_(parameter)
    with torch.autocast("cpu", torch.bfloat16):
        assert embedding(TOKENS).dtype == torch.bfloat16
