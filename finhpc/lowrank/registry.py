"""The ways to be low-rank: `method.kind` -> the layer that takes a linear layer's place.

A new one is one file like `cola.py`, here or in a plugin (`finhpc.plugins`). Its layer says how it starts (`init`) and
whether B A can be multiplied out (`mergeable`). `STARTED` are other ways to begin, with layers that are here.
"""

from __future__ import annotations

from inspect import getattr_static
from typing import Any

import torch

from finhpc.errors import ConfigError
from finhpc.lowrank.cola import ColaLinear
from finhpc.lowrank.initialize import SCHEMES
from finhpc.lowrank.layers import LowRankLinear
from finhpc.plugins import Registry
from finhpc.settings.base import nearest

DENSE = "dense"
SVD, BLEND = "svd", "blend"
# Ways to start from a dense model's weights -> the kind of the model that is trained and saved.
STARTED = {SVD: "low_rank", BLEND: "low_rank"}


def _check_layer(name: str, layer: Any) -> None:
    """Refuse a layer that an export in fewer bits, or a merged one, would not compute as training does."""
    if not (isinstance(layer, type) and issubclass(layer, LowRankLinear)):
        raise ConfigError(f"method.kind={name} must be a class derived from finhpc.lowrank.layers.LowRankLinear.")
    problems = []
    if name in (DENSE, *STARTED):
        problems.append("the name has its meaning already; choose another.")
    if layer.init not in SCHEMES:
        problems.append(f"init={layer.init!r} is no way to start; {nearest(str(layer.init), list(SCHEMES))}")
    if not isinstance(getattr_static(layer, "between"), staticmethod):
        problems.append("between must be a @staticmethod of A x; a quantized layer takes it alone.")
    if layer.forward is not LowRankLinear.forward:
        problems.append("it has a forward of its own, which quantized exports would lose; write it as between.")
    elif layer.between is not LowRankLinear.between and layer.mergeable:
        problems.append("between does something, so that B A is not the whole layer; set mergeable = False.")
    with torch.device("meta"):
        held = {key for key, _ in layer(4, 4, 2, True).named_parameters()}
    if held != {"A", "B", "bias"}:
        problems.append(f"it holds {', '.join(sorted(held))}; a low-rank layer's parameters are A, B and bias.")
    if problems:
        raise ConfigError([f"method.kind={name}: {problem}" for problem in problems])


LAYERS: Registry[type[LowRankLinear]] = Registry(
    "method.kind", {"low_rank": LowRankLinear, "cola": ColaLinear}, _check_layer
)


def layers_kind(kind: str) -> str:
    """The kind in `LAYERS` (or dense) whose layers a `method.kind` trains."""
    return STARTED.get(kind, kind)


def check_kind(kind: str) -> None:
    """Raise `ConfigError` where `method.kind` is neither dense nor registered."""
    known = [DENSE, *LAYERS, *STARTED]
    if kind not in known:
        raise ConfigError(
            f"method.kind={kind} is no method; {nearest(kind, known)} One of your own comes from --plugins MODULE."
        )
