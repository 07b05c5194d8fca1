"""Training with rounded weights in torch's own way, a parametrization, as a reference."""

from __future__ import annotations

import re
from typing import cast

from torch import Tensor, nn
from torch.nn.utils import parametrize

from finhpc.quantization.fake import matrices, rounded_weight


class Rounding(nn.Module):
    def __init__(self, owner: nn.Module, bits: int) -> None:
        super().__init__()
        self.owner, self.bits = (owner,), bits  # a tuple hides the owner's parameters

    def forward(self, weight: Tensor) -> Tensor:
        return rounded_weight(self.owner[0], weight, self.bits)


def round_on_each_use(model: nn.Module, bits: int) -> None:
    """Let every matrix of `model` be rounded on each use; `plain_name` undoes the change of the parameters' names."""
    for module in list(model.modules()):
        if not isinstance(module, parametrize.ParametrizationList):
            for name in matrices(module):
                parametrize.register_parametrization(module, name, Rounding(module, bits), unsafe=True)


def plain_name(name: str) -> str:
    """`c_fc.parametrizations.weight.original` is `c_fc.weight`."""
    return cast(str, re.sub(r"(^|\.)parametrizations\.(\w+)\.original$", r"\1\2", name))
