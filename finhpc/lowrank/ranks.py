"""How many directions of a layer to keep: from a share of its parameters or of its energy."""

from __future__ import annotations

import torch
from torch import Tensor


def rank_of_params(out_features: int, in_features: int, share: float) -> int:
    """The largest rank whose factors hold at most `share` of the weight's parameters; at least 1."""
    fits = int(share * out_features * in_features / (out_features + in_features))
    return max(1, min(fits, out_features, in_features))


def rank_of_energy(values: Tensor, share: float) -> int:
    """The smallest rank whose squared singular values hold `share` of their sum. `values`: largest first."""
    held = values.double().square().cumsum(0)
    enough = held >= share * held[-1] * (1 - 1e-12)  # all of it, but for rounding, where share is 1
    return int(torch.nonzero(enough)[0]) + 1
