"""CoLA: a nonlinearity between the two narrow matrices.

Z. Liu et al., "CoLA: Compute-Efficient Pre-Training of LLMs via Low-Rank Activation", 2025: the
activations of a transformer are nearly low-rank, so the SiLU is applied to the narrow ones.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from finhpc.lowrank.layers import LowRankLinear


class ColaLinear(LowRankLinear):
    """y = B silu(A x) + bias; shapes as `LowRankLinear`. B and A cannot be multiplied out to one matrix."""

    init = "cola"
    mergeable = False

    @staticmethod
    def between(narrow: Tensor) -> Tensor:
        return F.silu(narrow)
