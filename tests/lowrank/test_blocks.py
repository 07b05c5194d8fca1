"""A pair for each of q, k and v in the place of one layer, and every kind of layer against its formula in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finhpc.errors import ConfigError
from finhpc.lowrank.initialize import cola
from finhpc.lowrank.layers import LowRankLinear
from finhpc.lowrank.registry import LAYERS
from finhpc.lowrank.replace import make_low_rank
from finhpc.models.lora.layers import FrozenLowRankLinear
from finhpc.quantization.frozen import FrozenFloat
from finhpc.quantization.minmax import MinMax, QuantizedLinear
from finhpc.settings.pretrain import Method


def silu(z: Tensor) -> Tensor:
    return z / (1 + torch.exp(-z))


def half(z: Tensor) -> Tensor:
    return torch.cat((z[..., :2], silu(z[..., 2:])), -1)  # of a rank of 5


FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {"low_rank": lambda z: z, "cola": silu, "half": half}


def made(kind: str, blocks: int, bias: bool = True) -> LowRankLinear:
    """A layer 8 -> 12 of rank 5, or of three pairs of it."""
    torch.manual_seed(0)
    layer = LAYERS[kind](8, 12, 5, bias, blocks)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def by_blocks(layer: LowRankLinear, x: Tensor, formula: Callable[[Tensor], Tensor]) -> Tensor:
    """Each block by itself, with loops and in the type of x."""
    rows, outputs = layer.out_features // layer.blocks, []
    for i in range(layer.blocks):
        a = layer.A.weight.to(x.dtype)[i * 5 : (i + 1) * 5]
        b = layer.B.weight.to(x.dtype)[i * rows : (i + 1) * rows]
        outputs.append(formula(x @ a.T) @ b.T)
    y = torch.cat(outputs, -1)
    return y if layer.B.bias is None else y + layer.B.bias.to(x.dtype)


def test_every_kind_of_layer_has_its_formula_here() -> None:
    assert {*FORMULAS, "sltrain"} == {name for name, _ in LAYERS.own()}, "test_sltrain.py has that of SLTrain"


@pytest.mark.parametrize("kind", FORMULAS)
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_are_those_of_the_formula(kind: str, blocks: int, bias: bool) -> None:
    layer, x = made(kind, blocks, bias), torch.randn(2, 3, 8, requires_grad=True)
    wanted = [x, *layer.parameters()]
    weights = torch.randn(2, 3, 12)
    exact = by_blocks(layer, x.double(), FORMULAS[kind])
    torch.testing.assert_close(layer(x).double(), exact, rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad((layer(x) * weights).sum(), wanted)
    theirs = torch.autograd.grad((exact * weights).sum(), wanted)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    z, matrix = layer.as_product(x)
    product = z @ matrix.T if layer.B.bias is None else z @ matrix.T + layer.B.bias
    torch.testing.assert_close(product.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("blocks", [1, 3])
def test_the_product_is_the_layer_and_the_pair_is_a_view(blocks: int) -> None:
    layer, x = made("low_rank", blocks), torch.randn(4, 8)
    torch.testing.assert_close(F.linear(x, layer.product(layer.A.weight, layer.B.weight), layer.B.bias), layer(x))
    a, b = layer.pair()
    assert (a.shape, b.shape) == (((5, 8), (12, 5)) if blocks == 1 else ((3, 5, 8), (3, 4, 5)))
    with torch.no_grad():
        b.zero_()
    assert not layer.B.weight.any()


@pytest.mark.parametrize("kind", FORMULAS)
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("bits", [16, 8])
def test_frozen_and_quantized_factors_compute_the_same(kind: str, blocks: int, bits: int) -> None:
    layer, x = made(kind, blocks), torch.randn(2, 3, 8, requires_grad=True)
    frozen = []
    with torch.no_grad():
        for module in (layer.A, layer.B):
            if bits == 16:
                frozen.append(FrozenFloat(module.weight.clone(), module.bias))
                continue
            tensors = MinMax().tensors(module.weight, bits, "w")
            shape = (module.out_features, module.in_features)
            frozen.append(QuantizedLinear(shape, bits, module.bias, tensors))
            module.weight.copy_(frozen[-1].dequantized())
    ours, z = FrozenLowRankLinear(*frozen, layer.between, layer.blocks), torch.randn(2, 3, 12)
    torch.testing.assert_close(ours(x), layer(x))
    mine, other = (torch.autograd.grad((of(x) * z).sum(), x) for of in (ours, layer))
    torch.testing.assert_close(mine, other)
    narrow, matrix = ours.as_product(x)
    torch.testing.assert_close(narrow @ matrix.T + layer.B.bias, layer(x))
    if bits < 16:  # as transformers opens a quantized model: only the linear layers are replaced
        layer.A, layer.B = frozen
        torch.testing.assert_close(layer(x), ours(x))


def test_only_the_layer_that_computes_q_k_and_v_is_divided() -> None:
    from finhpc.models.families.registry import config_of_method, resolve_shape, skeleton
    from finhpc.settings.pretrain import Model

    for preset, names in {"gpt2-tiny": {"attn.c_attn"}, "llama-tiny": set()}.items():
        shape = resolve_shape(Model(preset=preset, layers=1))
        model = skeleton(config_of_method(shape, Method(rank=8, qkv="separate")))
        layers = {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
        assert {name.split("h.0.")[-1] for name, layer in layers.items() if layer.blocks == 3} == names
        assert {layer.blocks for layer in layers.values()} == ({1, 3} if names else {1})


def test_each_block_starts_as_a_layer_of_its_own() -> None:
    from finhpc.models.families.registry import config_of_method, resolve_shape
    from finhpc.models.initialize import initial_model
    from finhpc.settings.pretrain import Model

    shape = resolve_shape(Model(preset="gpt2-tiny", layers=1, width=128), 101)
    config = config_of_method(shape, Method(kind="cola", rank=16, qkv="separate"))
    layer = initial_model(config, 1, None).get_submodule("transformer.h.0.attn.c_attn")
    wanted = cola(torch.empty(128, 128), 16, torch.Generator())[1].std()
    assert layer.B.weight.std().item() == pytest.approx(float(wanted), rel=0.05)
    spectral = initial_model(config, 1, "spectral").get_submodule("transformer.h.0.attn.c_attn")
    a, b = (factor.detach().double() for factor in spectral.pair())
    for i in range(3):  # the best factors of a block: balanced, and in B orthogonal
        gram = b[i].T @ b[i]
        torch.testing.assert_close(gram, a[i] @ a[i].T, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(gram, gram.diagonal().diag(), rtol=1e-3, atol=1e-6)


def test_a_rank_must_fit_each_block() -> None:
    model = nn.ModuleDict({"qkv": nn.Linear(16, 24)})
    with pytest.raises(ConfigError, match=r"method\.rank=9 does not fit qkv \(8 x 16, layers: 1\); use 1 to 8 "):
        make_low_rank(model, {"attention": 9}, lambda name: "attention" if name else None, blocks_of=lambda name: 3)
    with pytest.raises(ConfigError, match=r"qkv has 24 rows, which are not 5 equal blocks; use qkv=joint"):
        make_low_rank(model, {"attention": 2}, lambda name: "attention" if name else None, blocks_of=lambda name: 5)
