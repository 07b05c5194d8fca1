"""The ways to be low-rank: `method.kind` -> the layer that replaces a linear layer; `method.init` -> how it starts.

A new layer is one file like `cola.py`, here or in a plugin (`finhpc.plugins`). Its class says how it is initialized
(`init`) and whether B A can be multiplied out (`mergeable`). `STARTED` lists the methods that start from a dense model
and train a layer of this table.
"""

from __future__ import annotations

from inspect import getattr_static
from typing import Any

import torch

from finhpc.errors import ConfigError
from finhpc.lowrank.cola import ColaLinear
from finhpc.lowrank.dlr import dlr
from finhpc.lowrank.half import HalfLinear
from finhpc.lowrank.initialize import Scheme, cola, normal, sltrain, spectral
from finhpc.lowrank.layers import LowRankLinear
from finhpc.lowrank.sltrain import SparseLinear
from finhpc.plugins import Registry
from finhpc.settings.base import nearest

DENSE = "dense"
SVD, BLEND = "svd", "blend"
SLTRAIN = "sltrain"
# Ways to start from a dense model's weights -> the kind of the model that is trained and saved.
STARTED = {SVD: "low_rank", BLEND: "low_rank"}
INITS: dict[str, Scheme] = {"spectral": spectral, "normal": normal, "cola": cola, "dlr": dlr, SLTRAIN: sltrain}
IN_BLOCKS = ("dlr",)  # of `INITS`: those that are not for the head and the embedding, which start as by default


def _check_layer(name: str, layer: Any) -> None:
    """Raise `ConfigError` for a layer that a quantized or merged export would compute differently from training."""
    if not (isinstance(layer, type) and issubclass(layer, LowRankLinear)):
        raise ConfigError(f"method.kind={name} must be a class derived from finhpc.lowrank.layers.LowRankLinear.")
    problems = []
    if name in (DENSE, *STARTED):
        problems.append("this name is taken; choose another.")
    if layer.init not in INITS:
        problems.append(f"init={layer.init!r} is an unknown initialization; {nearest(str(layer.init), list(INITS))}")
    if not isinstance(getattr_static(layer, "between"), staticmethod):
        problems.append("between must be a @staticmethod of A x, because a frozen layer takes only this function.")
    if layer.forward is not LowRankLinear.forward:
        problems.append("it has its own forward, which quantized exports would lose; write it as between.")
    elif layer.between is not LowRankLinear.between and layer.mergeable:
        problems.append("between changes A x, so B A is not the whole layer; set mergeable = False.")
    with torch.device("meta"):
        names = {name for name, _ in layer(4, 4, 2, True, 2).named_parameters()}
    if names != {"A.weight", "B.weight", "B.bias"}:
        problems.append(
            f"it has the parameters {', '.join(sorted(names))}; a low-rank layer has A.weight, B.weight and B.bias."
        )
    if problems:
        raise ConfigError([f"method.kind={name}: {problem}" for problem in problems])


LAYERS: Registry[type[LowRankLinear]] = Registry(
    "method.kind",
    {"low_rank": LowRankLinear, "cola": ColaLinear, "half": HalfLinear, SLTRAIN: SparseLinear},
    _check_layer,
)


def trained_kind(kind: str) -> str:
    """Return the kind of layer that a `method.kind` trains: a key of `LAYERS`, or dense."""
    return STARTED.get(kind, kind)


def check_kind(kind: str) -> None:
    """Raise `ConfigError` if `method.kind` is neither dense nor registered."""
    known = [DENSE, *LAYERS, *STARTED]
    if kind not in known:
        raise ConfigError(
            f"method.kind={kind} is unknown; {nearest(kind, known)} One of your own comes from --plugins MODULE."
        )
