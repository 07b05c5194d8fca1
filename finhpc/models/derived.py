"""Weights that are made from the trained ones once per step: rounded to 8 or 4 bits, cast to bfloat16, or both.

Every micro-batch of a step computes with the same tensors, and their gradients pass on to the trained float32 weights,
in which they are summed. So a cast or a rounding costs the same for one micro-batch as for many, and a compiled graph
does not contain it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from finhpc.quantization.fake import matrices, rounded_weight
from finhpc.settings.training import Precision


class DerivedWeights:
    """The derived weights of some modules.

    While they are set, `module.weight` is the derived tensor, and `module.named_parameters()` has the trained one. With
    `bits` below 16 every matrix is rounded. With precision `bf16` the parameters of linear layers are cast, as autocast
    does on each use; with `bf16-weights` all parameters are.
    """

    def __init__(self, modules: nn.Module, precision: Precision, bits: int = 16) -> None:
        self.modules, self.precision, self.bits = modules, precision, bits
        self.are_set = False

    def _derived(self, module: nn.Module, name: str, weight: Tensor) -> Tensor:
        if self.bits < 16 and name in matrices(module):
            weight = rounded_weight(module, weight, self.bits)
        if self.precision == "bf16-weights" or (self.precision == "bf16" and _casts(module)):
            weight = weight.to(torch.bfloat16)
        return weight

    def set(self) -> None:
        """Make them from the trained weights as they are now."""
        for module in self.modules.modules():
            for name, weight in module.named_parameters(recurse=False):
                derived = self._derived(module, name, weight)
                if derived is not weight:
                    module.__dict__[name] = derived  # found before the parameter of that name
        self.are_set = True

    def drop(self) -> None:
        """Forget them: the modules compute with the trained weights again."""
        for module in self.modules.modules():
            for name in module._parameters:
                module.__dict__.pop(name, None)
        self.are_set = False

    @contextmanager
    def once(self) -> Iterator[None]:
        """Set them for one pass, unless they are set for a whole step."""
        mine = not self.are_set
        if mine:
            self.set()
        try:
            yield
        finally:
            if mine:
                self.drop()


def _casts(module: nn.Module) -> bool:
    """Return whether a module casts its own parameters to the type of its inputs."""
    return isinstance(module, nn.Linear | Conv1D) or getattr(module, "casts_parameters", False)
