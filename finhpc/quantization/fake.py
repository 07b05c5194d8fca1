"""Training with the weights that an 8- or 4-bit model will have.

The float weights are trained; each use first rounds them to their row's grid (`per_vector`), and the gradient passes
straight through the rounding. Exported at the same bits, the model has exactly the weights of the forward pass.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
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


class FakeQuantize(nn.Module):
    """The parametrization weight -> rounded weight. `transposed`: stored as (in, out)."""

    def __init__(self, bits: int, transposed: bool) -> None:
        super().__init__()
        self.bits, self.transposed = bits, transposed

    def forward(self, weight: Tensor) -> Tensor:
        return StraightThrough.apply(weight, self.bits, self.transposed)  # type: ignore[no-untyped-call, no-any-return]


def fake_quantize(model: nn.Module, bits: int) -> None:
    """Make every module of `model` compute with rounded matrices; the trained parameters stay float32.

    The parameters stay the same objects; `plain_name` undoes the change of their names.
    """
    for module in list(model.modules()):
        if not isinstance(module, parametrize.ParametrizationList):
            for name in matrices(module):
                # unsafe: rounding preserves shape and dtype, and checking that would compute it once more.
                parametrize.register_parametrization(
                    module, name, FakeQuantize(bits, is_transposed(module)), unsafe=True
                )


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


def plain_name(name: str) -> str:
    """Return a parameter's name without `fake_quantize`: `c_fc.parametrizations.weight.original` is `c_fc.weight`."""
    return re.sub(r"(^|\.)parametrizations\.(\w+)\.original$", r"\1\2", name)


def trained_bits(config: Any) -> int:
    """Return the bits that the model of a config was trained at; 16 if its weights were not quantized."""
    return int((getattr(config, TRAINED, None) or {"bits": 16})["bits"])


def _rounded(weight: Tensor, bits: int, transposed: bool) -> Tensor:
    return rounded(weight.T, bits).T if transposed else rounded(weight, bits)
