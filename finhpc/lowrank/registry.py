"""The ways to be low-rank: `method.kind` -> the layer that takes a linear layer's place.

A new one is one file beside `cola.py`, whose layer says how it starts (`init`) and whether B A can be
multiplied out (`mergeable`), and one line here. `STARTED` are other ways to begin, with layers that are here.
"""

from __future__ import annotations

from finhpc.config import nearest
from finhpc.errors import ConfigError
from finhpc.lowrank.cola import ColaLinear
from finhpc.lowrank.layers import LowRankLinear

DENSE = "dense"
LAYERS: dict[str, type[LowRankLinear]] = {
    "low_rank": LowRankLinear,
    "cola": ColaLinear,
}
SVD, BLEND = "svd", "blend"
# Ways to start from a dense model's weights -> the kind of the model that is trained and saved.
STARTED = {SVD: "low_rank", BLEND: "low_rank"}


def layers_kind(kind: str) -> str:
    """The kind in `LAYERS` (or dense) whose layers a `method.kind` trains."""
    return STARTED.get(kind, kind)


def check_kind(kind: str) -> None:
    """Raise `ConfigError` where `method.kind` is neither dense nor registered."""
    known = [DENSE, *LAYERS, *STARTED]
    if kind not in known:
        raise ConfigError(f"method.kind={kind} is no method; {nearest(kind, known)}")
