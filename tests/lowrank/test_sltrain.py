"""SLTrain: its formula and gradients, by hand and in float64, its support, its operations, what it is refused for."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from finhpc.errors import ConfigError
from finhpc.generation.fast_layers import PackedLinear, use_fast_layers
from finhpc.lowrank.sltrain import SparseLinear, multiplied
from finhpc.models.families.registry import config_of_method, dense_original, resolve_shape, skeleton
from finhpc.models.initialize import initial_model
from finhpc.models.lora.targets import target_shapes
from finhpc.planning.outline import outline_of
from finhpc.planning.step_time import making_operations, part_operations, step_operations
from finhpc.settings.base import build
from finhpc.settings.finetune import Lora
from finhpc.settings.pretrain import Method, Model, PretrainConfig
from finhpc.training.optimizers.stage import make_optimizer

RANK, SHARE = 4, 0.1
PINNED = [16, 43, 47, 62, 79, 101]


def made(bias: bool, blocks: int) -> SparseLinear:
    """A layer 10 -> 12 with random weights."""
    torch.manual_seed(0)
    layer = SparseLinear(10, 12, RANK, bias, blocks, name="a", share=SHARE, lora_alpha=6.0, seed=1)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def exact(layer: SparseLinear) -> Tensor:
    """W in float64, entry by entry; scale = lora_alpha / rank = 1.5."""
    a, b, s = (tensor.double() for tensor in (layer.A.weight, layer.B.weight, layer.S))
    rows = layer.out_features // layer.blocks
    w = torch.cat([1.5 * b[i * rows : (i + 1) * rows] @ a[i * RANK : (i + 1) * RANK] for i in range(layer.blocks)])
    entries = torch.zeros(12, 10, dtype=torch.float64)
    for place, value in zip(layer.support.tolist(), s, strict=True):
        entries[place // 10, place % 10] = value
    return w + entries


def test_two_by_two_by_hand() -> None:
    """W = 2 [3, -1]^T [1, 2] + 5 at (0, 1) = [[6, 17], [-2, -4]]; the gradient of y_0 = W_0 x at x = (1, 1)."""
    layer = SparseLinear(2, 2, 1, False, share=0.25, lora_alpha=2.0)
    layer.support.fill_(1)
    with torch.no_grad():
        layer.A.weight.copy_(torch.tensor([[1.0, 2.0]]))
        layer.B.weight.copy_(torch.tensor([[3.0], [-1.0]]))
        layer.S.fill_(5.0)
    x = torch.ones(1, 2, requires_grad=True)
    y = layer(x)
    assert y.tolist() == [[23.0, -6.0]]
    y[0, 0].backward()
    gradients = [tensor.grad for tensor in (x, layer.A.weight, layer.B.weight, layer.S)]
    assert [grad.tolist() for grad in gradients if grad is not None] == [[[6, 17]], [[6, 6]], [[6], [0]], [1]]


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_are_those_of_the_formula(blocks: int, bias: bool) -> None:
    layer, x = made(bias, blocks), torch.randn(2, 3, 10, requires_grad=True)
    weights, wanted = torch.randn(2, 3, 12), [x, *layer.parameters()]
    expected = x.double() @ exact(layer).T + (layer.B.bias.double() if bias else 0)
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad((layer(x) * weights).sum(), wanted)
    theirs = torch.autograd.grad((expected * weights).sum(), wanted)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    z, matrix = layer.as_product(x)
    torch.testing.assert_close((z @ matrix.T).double(), x.double() @ exact(layer).T, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        torch.testing.assert_close(layer(x).double(), expected, rtol=0.05, atol=0.2)


def test_w_is_not_stored_for_the_backward_pass() -> None:
    saved: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        made(True, 1)(torch.randn(2, 10))
    assert 0 < max(saved) < 120


def test_the_support_follows_from_seed_and_name_and_never_changes() -> None:
    layer = SparseLinear(16, 8, 2, False, name="h.0.mlp", share=0.05, seed=3)
    assert layer.support.tolist() == PINNED, "models on disk would lose their S"
    assert layer.support.dtype == torch.int32
    others = [
        SparseLinear(16, 8, 2, False, name=name, share=0.05, seed=seed) for name, seed in (("x", 3), ("h.0.mlp", 4))
    ]
    for other in others:
        assert len(other.support) == 6
        assert other.support.tolist() != PINNED
    assert "support" not in layer.state_dict()
    half = SparseLinear(100, 100, 2, False, share=0.5).support
    assert all(a < b for a, b in pairwise(half.tolist())), "no place twice"
    assert (len(half), half.min() >= 0, half.max() < 10000) == (5000, True, True)
    assert half.double().mean().item() == pytest.approx(5000, rel=0.03), "everywhere alike"


def model_of(preset: str = "gpt2-tiny", **method: Any) -> Any:
    shape = resolve_shape(Model(preset=preset, layers=1, width=32), 101)
    return config_of_method(shape, Method(kind="sltrain", rank=4, head="dense", **method), seed=7)


def test_it_starts_as_in_the_authors_code() -> None:
    layer = initial_model(model_of(sparse_share=0.2), 1, None).get_submodule("transformer.h.0.mlp.c_fc")
    assert not layer.B.weight.any()
    for values, in_features in ((layer.A.weight, 32), (layer.S, 32)):
        bound = in_features**-0.5
        assert values.abs().max() <= bound
        assert values.std().item() == pytest.approx(bound / 3**0.5, rel=0.15), "uniform"
    assert len(layer.S) == int(0.2 * 32 * 128)
    assert layer.scale == 32 / 4
    assert torch.equal(
        layer.support, SparseLinear(32, 128, 4, True, 1, "transformer.h.0.mlp.c_fc", 0.2, seed=7).support
    )


def test_its_parameters_and_operations_are_counted() -> None:
    config = model_of(qkv="separate", sparse_share=0.05)
    model, outline = skeleton(config), outline_of(config, 16)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert outline.params == total
    dense = outline_of(dense_original(config), 16)
    shapes = [(96, 32), (32, 32), (128, 32), (32, 128)]
    removed = sum(out * into for out, into in shapes)
    pairs = 3 * 4 * (32 + 32) + 4 * (32 + 32) + 2 * 4 * (32 + 128)
    sparse = sum(int(0.05 * out * into) for out, into in shapes)
    assert total == dense.params - removed + pairs + sparse
    assert multiplied(model.get_submodule("transformer.h.0.mlp")) == 2 * 32 * 128
    for kind in dense.operations:
        assert part_operations(outline, kind) == part_operations(dense, kind), "a token meets W"
        assert outline.operations[kind] == dense.operations[kind], "which balances the stages"
    making = sum(making_operations(outline, kind) for kind in outline.kinds)
    assert step_operations(outline, 6, 3) == step_operations(dense, 6) + 3 * making
    for bits in (8, 4):
        assert outline.stored_bytes(bits) == dense.stored_bytes(bits), "quantized, it is stored merged"

    layer, x = made(True, 3), torch.randn(7, 10, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == 6 * 7 * 120 + 8 * RANK * 120, "4 products of B A's size"
    assert making == 8 * 4 * removed


def test_decoding_multiplies_it_out() -> None:
    layer, x = made(True, 3), torch.randn(2, 10)
    model, expected = nn.Sequential(layer), layer(x).detach()
    assert use_fast_layers(model)["merged"] == 1
    assert isinstance(model[0], PackedLinear)
    torch.testing.assert_close(model(x).detach(), expected, rtol=1e-5, atol=1e-5)


def test_its_entries_decay_as_a_dense_matrix_does() -> None:
    config = build(PretrainConfig, {"method": {"kind": "sltrain"}, "optimizer": {"weight_decay": 0.5}})
    named = {f"h.0.{name}": parameter for name, parameter in made(True, 1).named_parameters()}
    groups = make_optimizer(named, config.optimizer).param_groups
    decays = {name: group["weight_decay"] for group in groups for name in group["names"]}
    assert decays == {"h.0.S": 0.5, "h.0.A.weight": 0.5, "h.0.B.weight": 0.5, "h.0.B.bias": 0.0}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"method": {"init": "spectral"}}, "method.init=spectral does not fit method.kind=sltrain"),
        ({"quantization": {"bits": 8, "when": "during"}}, "when=during rounds matrices, and the entries of S"),
    ],
)
def test_settings_that_do_not_fit_it(sections: dict[str, Any], message: str) -> None:
    sections = sections | {"method": {"kind": "sltrain", **sections.get("method", {})}}
    (problem,) = build(PretrainConfig, sections).problems()
    assert message in problem


def test_shares_and_adapters_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"method\.sparse_share"):
        build(PretrainConfig, {"method": {"kind": "sltrain", "sparse_share": 0.6}})
    with pytest.raises(ConfigError, match=r"method\.kind=sltrain takes no adapter; make it dense with `finhpc export"):
        target_shapes(skeleton(model_of()), Lora(), 16)
