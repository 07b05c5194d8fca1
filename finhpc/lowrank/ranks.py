"""Choose a rank from a share of a layer's parameters or of its energy, for `finhpc decompose`.

`method.rank` is read by `ranks_of` in `replace.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rank_of_params(out_features: int, in_features: int, share: float) -> int:
    """Return the largest rank whose factors have at most `share` of the weight's parameters; at least 1."""
    fits = int(share * out_features * in_features / (out_features + in_features))
    return max(1, min(fits, out_features, in_features))


def rank_of_energy(values: Tensor, share: float) -> int:
    """Return the smallest rank whose squared singular values reach `share` of their sum. `values`: largest first."""
    energy = values.double().square().cumsum(0)
    enough = energy >= share * energy[-1] * (1 - 1e-12)  # tolerates rounding if share is 1
    return int(torch.nonzero(enough)[0]) + 1
