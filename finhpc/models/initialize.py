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
from torch import Generator, Tensor, nn
from transformers.pytorch_utils import Conv1D

from finhpc.lowrank.blend import Blended, BlendEmbedding, BlendLinear
from finhpc.lowrank.initialize import SCHEMES
from finhpc.lowrank.layers import LowRankEmbedding, LowRankLinear
from finhpc.lowrank.replace import dense_shape
from finhpc.models.families.registry import family_of
from finhpc.models.files.weights import Weights

Fill = Callable[[nn.Module, str], None]  # sets the weights of the module with that Hugging Face name, in place


def random_fill(config: Any, seed: int, scheme: str | None) -> Fill:
    """Return a `Fill` that draws weights from the seed; see `initialize`."""
    return partial(initialize, config=config, seed=seed, scheme=scheme)


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


def initialize(module: nn.Module, name: str, config: Any, seed: int, scheme: str | None) -> None:
    """Fill `module`, whose Hugging Face name is `name`, in place.

    `scheme` is how low-rank layers start; None: as each layer's class says. Matrices are drawn on the
    CPU in float32, so every device starts from the same numbers.
    """
    for sub_name, sub in module.named_modules():
        if any(True for _ in sub.parameters(recurse=False)):
            full = f"{name}.{sub_name}" if sub_name else name
            with torch.no_grad():
                _fill(sub, full, family_of(config).init_std(full, config), seed, scheme)


def _fill(module: nn.Module, name: str, std: float, seed: int, scheme: str | None) -> None:
    generator = generator_of(seed, name)
    if isinstance(module, LowRankLinear):
        dense = torch.randn(module.out_features, module.in_features, generator=generator) * std
        a, b = SCHEMES[scheme or module.init](dense, module.rank, generator)
        module.A.copy_(a)
        module.B.copy_(b)
        if isinstance(module, BlendLinear):
            module.W.copy_(dense)
        if module.bias is not None:
            module.bias.zero_()
    elif isinstance(module, LowRankEmbedding):
        dense = torch.randn(module.num_embeddings, module.embedding_dim, generator=generator) * std
        a, b = SCHEMES[scheme or module.init](dense.T, module.rank, generator)
        module.A.copy_(a.T)
        module.B.copy_(b)
        if isinstance(module, BlendEmbedding):
            module.W.copy_(dense)
    elif dense_shape(module) is not None:
        weight = module.weight
        assert isinstance(weight, Tensor)
        shape = dense_shape(module)
        assert shape is not None
        # Drawn as (out, in), or (rows, dim) for an embedding, whatever the module stores.
        drawn = shape[::-1] if isinstance(module, nn.Embedding) else shape
        dense = torch.randn(*drawn, generator=generator) * std
        weight.copy_(dense if weight.shape == dense.shape and not _transposed(module) else dense.T)
        bias = getattr(module, "bias", None)
        if bias is not None:
            bias.zero_()
    else:  # a norm: scale 1, shift 0
        for parameter_name, parameter in module.named_parameters(recurse=False):
            parameter.fill_(0.0 if parameter_name == "bias" else 1.0)


def _transposed(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"


def generator_of(seed: int, name: str) -> Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
