"""How a model gets its first weights: drawn from a seed, or read from a model on disk.

A drawn weight depends on (seed, name of the weight) alone, so any cut into stages, any replica and the plain model
start bit-equal.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Generator, nn
from transformers.pytorch_utils import Conv1D

from finhpc.lowrank.blend import Blended
from finhpc.lowrank.initialize import uniform
from finhpc.lowrank.layers import LowRank, LowRankLinear, is_factor
from finhpc.lowrank.registry import IN_BLOCKS, INITS
from finhpc.lowrank.replace import dense_shape
from finhpc.lowrank.sltrain import SparseLinear, set_supports
from finhpc.models.families.registry import family_of, skeleton
from finhpc.models.files.weights import Weights

Fill = Callable[[nn.Module, str], None]  # sets the weights of the module with that Hugging Face name, in place


def random_fill(config: Any, seed: int, scheme: str | None) -> Fill:
    """Return a `Fill` that draws weights from the seed; see `initialize`."""
    return partial(initialize, config=config, seed=seed, scheme=scheme)


@torch.no_grad()
def not_a_number(module: nn.Module, name: str) -> None:
    """Set all weights to NaN: a `Fill` for a model whose weights are loaded next. One that is not loaded shows."""
    for parameter in module.parameters():
        parameter.fill_(float("nan"))


def weights_fill(weights: Weights, dense: Weights | None = None) -> Fill:
    """Return a `Fill` that reads each module's weights when the module is built, so a stage reads only its own.

    `dense` has the W of blended layers. The fill raises `CheckpointError` naming a weight that has NaN or infinity.
    """

    @torch.no_grad()
    def fill(module: nn.Module, name: str) -> None:
        for sub_name, sub in module.named_modules(prefix=name):
            for parameter_name, parameter in sub.named_parameters(recurse=False):
                if isinstance(sub, Blended) and parameter_name == "W":
                    assert dense is not None
                    weight = dense.read(f"{sub_name}.weight")
                    transposed = isinstance(dense.skeleton.get_submodule(sub_name), Conv1D)
                    parameter.copy_(weight.T if transposed else weight)
                else:
                    parameter.copy_(weights.read(f"{sub_name}.{parameter_name}"))

    return fill


@torch.no_grad()
def initialize(module: nn.Module, name: str, config: Any, seed: int, scheme: str | None) -> None:
    """Draw the weights of `module`, whose Hugging Face name is `name` (empty: the whole model), in place.

    `scheme` initializes low-rank layers; None: each layer class's default. Matrices are drawn on the CPU in float32,
    so every device starts from the same numbers.
    """
    family = family_of(config)
    for sub_name, sub in module.named_modules():
        full = f"{name}.{sub_name}".strip(".")
        std, generator = family.init_std(full, config), generator_of(seed, full)
        if isinstance(sub, LowRank):
            outside = scheme in IN_BLOCKS and family.layer_kind(full) in ("head", "embedding")
            _draw_factors(sub, std, generator, None if outside else scheme)
        elif not is_factor(module, sub_name):
            _draw(sub, std, generator)


def _draw_factors(layer: LowRank, std: float, generator: Generator, scheme: str | None) -> None:
    if isinstance(layer, LowRankLinear):
        dense = torch.randn(layer.out_features, layer.in_features, generator=generator) * std
        blocks = dense.chunk(layer.blocks)
        pairs = [INITS[scheme or layer.init](block, layer.rank, generator) for block in blocks]
        a, b = (torch.cat(factors) for factors in zip(*pairs, strict=True))
        layer.A.weight.copy_(a)
        if layer.B.bias is not None:
            layer.B.bias.zero_()
    else:
        dense = torch.randn(layer.num_embeddings, layer.embedding_dim, generator=generator) * std
        a, b = INITS[scheme or layer.init](dense.T, layer.rank, generator)
        layer.A.weight.copy_(a.T)
    layer.B.weight.copy_(b)
    if isinstance(layer, SparseLinear):
        layer.S.copy_(uniform(len(layer.S), layer.in_features, generator))
    if isinstance(layer, Blended):  # self-guided training starts at the low-rank model
        layer.W.copy_(layer.product(layer.A.weight, layer.B.weight))


def _draw(module: nn.Module, std: float, generator: Generator) -> None:
    shape = dense_shape(module)
    for name, parameter in module.named_parameters(recurse=False):
        if shape is None:  # a norm: scale 1, shift 0
            parameter.fill_(0.0 if name == "bias" else 1.0)
        elif name == "bias":
            parameter.zero_()
        else:  # drawn as (out, in), or (rows, dim) for an embedding, whatever the module stores
            dense = (
                torch.randn(*(shape[::-1] if isinstance(module, nn.Embedding) else shape), generator=generator) * std
            )
            parameter.copy_(dense.T if isinstance(module, Conv1D) else dense)


def initial_model(hf_config: Any, seed: int, scheme: str | None) -> Any:
    """Build the whole model on the CPU with the weights that training starts from."""
    model: Any = skeleton(hf_config).to_empty(device="cpu")
    initialize(model, "", hf_config, seed, scheme)
    set_supports(model)
    model.tie_weights()
    fill_buffers(model, model)
    return model


@torch.no_grad()
def fill_buffers(model: Any, module: nn.Module) -> None:
    """Compute the buffers of `module`, a part of transformers' `model`, such as the factor of Gemma's embedding."""
    for sub in module.modules():
        if any(True for _ in sub.buffers(recurse=False)):
            weights: list[Any] = list(sub.parameters())
            for weight in weights:
                weight._is_hf_initialized = True  # transformers leaves those as they are
            model._init_weights(sub)
            for weight in weights:
                del weight._is_hf_initialized


def generator_of(seed: int, name: str) -> Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
