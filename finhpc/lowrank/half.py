"""Half of the latent linear, half not: what CoLA's SiLU loses for a linear map, the linear half keeps.

CoLA (see `cola.py`) applies its SiLU to the whole latent; here B sees [A1 x ; silu(A2 x)], at the same parameters and
operations. It is an experiment of this project, not a published method.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from finhpc.lowrank.layers import LowRankLinear


class HalfLinear(LowRankLinear):
    """y = B [A1 x ; silu(A2 x)] + bias; A1 is the first half of the rows of A, one fewer than A2 at an odd rank.

    Shapes as `LowRankLinear`. B and A cannot be multiplied out to one matrix.
    """

    init = "cola"
    mergeable = False

    @staticmethod
    def between(narrow: Tensor) -> Tensor:
        linear = narrow.shape[-1] // 2
        return torch.cat((narrow[..., :linear], F.silu(narrow[..., linear:])), -1)
