"""Training that starts from the weights of a model on disk."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from finhpc.lowrank.blend import Blended
from finhpc.models.files.weights import Weights
from finhpc.models.initialize import Fill


def stored(weights: Weights, dense: Weights | None = None) -> Fill:
    """Start from weights on disk, each read when its module is made: a stage reads its own alone.

    `dense` holds the W of blended layers. The fill raises `CheckpointError` naming a weight that holds
    NaN or infinity.
    """
    return partial(_copy, weights, dense)


@torch.no_grad()
def _copy(weights: Weights, dense: Weights | None, module: nn.Module, name: str) -> None:
    for sub_name, sub in module.named_modules(prefix=name):
        for parameter_name, parameter in sub.named_parameters(recurse=False):
            if isinstance(sub, Blended) and parameter_name == "W":
                assert dense is not None
                parameter.copy_(_matrix(dense, sub_name))
            else:
                parameter.copy_(weights.read(f"{sub_name}.{parameter_name}"))


def _matrix(dense: Weights, name: str) -> Tensor:
    """A linear layer's weight as (out, in), an embedding's as it is."""
    weight = dense.read(f"{name}.weight")
    return weight.T if isinstance(dense.skeleton.get_submodule(name), Conv1D) else weight
