"""Training with the weights that an 8- or 4-bit model will have.

The float weights are trained; each use first rounds them to their row's grid (`per_vector`), and the gradient passes
straight through the rounding. Exported at the same bits, the model has exactly the weights of the forward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from finhpc.quantization.per_vector import rounded

TRAINED = "quantized_training"  # key of a model's config.json: {"bits": 8 or 4, "scheme": "minmax"}


class StraightThrough(torch.autograd.Function):
    """Rounds in the forward pass; the gradient of a weight is that of the rounded weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bits: int, transposed: bool) -> Tensor:
        return _rounded(weight, bits, transposed)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], None, None


def rounded_weight(module: nn.Module, weight: Tensor, bits: int) -> Tensor:
    """Return a matrix of `module` rounded to `bits`; its gradient is that of the matrix."""
    return StraightThrough.apply(weight, bits, is_transposed(module))  # type: ignore[no-untyped-call, no-any-return]


def round_weights(model: nn.Module, bits: int) -> None:
    """Round every matrix of `model` in place, a tied one once."""
    done: set[int] = set()
    with torch.no_grad():
        for module in model.modules():
            for name in matrices(module):
                parameter = module.get_parameter(name)
                if id(parameter) not in done:
                    done.add(id(parameter))
                    parameter.copy_(_rounded(parameter.float(), bits, is_transposed(module)))


def matrices(module: nn.Module) -> list[str]:
    """Return the names of `module`'s own matrices, which are quantized; norms and biases are not."""
    return [name for name, parameter in module.named_parameters(recurse=False) if parameter.dim() == 2]


def is_transposed(module: nn.Module) -> bool:
    """Return whether a module stores its matrix as (in, out), so that an output's vector is a column."""
    return isinstance(module, Conv1D)


def trained_bits(config: Any) -> int:
    """Return the bits that the model of a config was trained at; 16 if its weights were not quantized."""
    return int((getattr(config, TRAINED, None) or {"bits": 16})["bits"])


def _rounded(weight: Tensor, bits: int, transposed: bool) -> Tensor:
    return rounded(weight.T, bits).T if transposed else rounded(weight, bits)
