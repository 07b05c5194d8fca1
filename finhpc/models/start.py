"""Training that starts from the weights of a model on disk."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from finhpc.models.initialize import Fill
from finhpc.models.weights import Weights


def stored(weights: Weights) -> Fill:
    """Start from weights on disk, each read when its module is made: a stage reads its own alone.

    The fill raises `CheckpointError` naming a weight that holds NaN or infinity.
    """
    return partial(_copy, weights)


def _copy(weights: Weights, module: nn.Module, name: str) -> None:
    with torch.no_grad():
        for parameter_name, parameter in module.named_parameters():
            parameter.copy_(weights.read(f"{name}.{parameter_name}"))
