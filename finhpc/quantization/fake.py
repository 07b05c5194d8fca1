"""Training with the weights that an 8- or 4-bit model will have.

The float weights stay what is trained; each time one is used, it is first rounded to its row's grid
(`per_vector`). The gradient passes straight through the rounding. Exported at the same bits, the
model has exactly the weights that the forward pass computed with.
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
    """Rounds in the forward pass; the gradient of a weight is that of its rounded one."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bits: int, turned: bool) -> Tensor:
        return _rounded(weight, bits, turned)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], None, None


class Rounded(nn.Module):
    """The parametrisation: weight -> the weight as quantised. `turned`: stored (in, out)."""

    def __init__(self, bits: int, turned: bool) -> None:
        super().__init__()
        self.bits, self.turned = bits, turned

    def forward(self, weight: Tensor) -> Tensor:
        return StraightThrough.apply(weight, self.bits, self.turned)  # type: ignore[no-untyped-call, no-any-return]


def fake_quantize(model: nn.Module, bits: int) -> None:
    """From now on every module of `model` computes with rounded matrices; what is trained stays float32.

    The parameters are the same objects; `plain_name` undoes the change of their names.
    """
    for module in list(model.modules()):
        if not isinstance(module, parametrize.ParametrizationList):
            for name in matrices(module):
                # Rounding keeps shape and dtype: nothing to be checked (that would compute it once more).
                parametrize.register_parametrization(module, name, Rounded(bits, is_turned(module)), unsafe=True)


def round_weights(model: nn.Module, bits: int) -> None:
    """Overwrite every matrix of `model` by its rounded one, a tied one once."""
    done: set[int] = set()
    with torch.no_grad():
        for module in model.modules():
            for name in matrices(module):
                parameter = module.get_parameter(name)
                if id(parameter) not in done:
                    done.add(id(parameter))
                    parameter.copy_(_rounded(parameter.float(), bits, is_turned(module)))


def matrices(module: nn.Module) -> list[str]:
    """Names of `module`'s own parameters that are quantised: its matrices. Norms and biases stay as they are."""
    return [name for name, parameter in module.named_parameters(recurse=False) if parameter.dim() == 2]


def is_turned(module: nn.Module) -> bool:
    """Whether its matrix is stored (in, out), so that an output's vector is a column."""
    return isinstance(module, Conv1D)


def plain_name(name: str) -> str:
    """A parameter's name without `fake_quantize`: `c_attn.parametrizations.A.original` is `c_attn.A`."""
    return re.sub(r"(^|\.)parametrizations\.(\w+)\.original$", r"\1\2", name)


def trained_bits(config: Any) -> int:
    """Bits that the model of a transformers config was trained at; 16 where its weights were not quantised."""
    return int((getattr(config, TRAINED, None) or {"bits": 16})["bits"])


def _rounded(weight: Tensor, bits: int, turned: bool) -> Tensor:
    return rounded(weight.T, bits).T if turned else rounded(weight, bits)
