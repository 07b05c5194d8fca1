"""The optimizers by name. A new one is a file like `muon.py` and a row here, or in a plugin (`finhpc.plugins`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from finhpc.errors import ConfigError
from finhpc.lowrank.replace import rank_problems
from finhpc.plugins import Registry
from finhpc.settings.base import nearest
from finhpc.settings.training import Optimizer
from finhpc.training.optimizers.adamw import ADAMW, ADAMW_8BIT
from finhpc.training.optimizers.apollo import APOLLO_MINI
from finhpc.training.optimizers.kind import OWN, OptimizerKind, Shape
from finhpc.training.optimizers.loro import LORO
from finhpc.training.optimizers.muon import MUON
from finhpc.training.optimizers.relora import RELORA
from finhpc.training.optimizers.schedules import SCHEDULES
from finhpc.training.optimizers.spectron import SPECTRON

# A dense matrix, and a pair, of a transformer block.
_SAMPLE = {"h.0.dense.weight": (4, 3), "h.0.pair.A.weight": (3, 4), "h.0.pair.B.weight": (5, 3)}


def _check_kind(name: str, kind: Any) -> None:
    """Take a step with small matrices: the optimizer's tensors must be those it names, or resuming would lose some."""
    if not isinstance(kind, OptimizerKind):
        raise ConfigError(f"optimizer.name={name} must be a finhpc.training.optimizers.kind.OptimizerKind.")
    taken = {key: nn.Parameter(torch.ones(shape)) for key, shape in _SAMPLE.items() if kind.takes(key, shape)}
    if not taken:
        raise ConfigError(f"optimizer.name={name} takes neither a dense matrix nor a pair of a transformer block.")
    for parameter in taken.values():
        parameter.grad = torch.ones_like(parameter)
    group = {"params": list(taken.values()), "names": list(taken), "by_inputs": set()}
    try:
        optimizer = kind.make([group | {"weight_decay": 0.0, "lr_scale": 1.0}], Optimizer())
        optimizer.step()
    except Exception as error:
        raise ConfigError(
            f"optimizer.name={name} fails in its first step ({type(error).__name__}: {error}); correct it."
        ) from None
    for parameter in taken.values():
        _check_state(name, kind, parameter, optimizer.state[parameter])


def _check_state(name: str, kind: OptimizerKind, parameter: Tensor, state: Mapping[str, Any]) -> None:
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if "step" not in kind.moments:
        tensors.pop("step", None)
    expected = kind.state_after(1, parameter, Optimizer())
    if set(tensors) != set(expected) or not set(expected) <= set(kind.moments):
        raise ConfigError(
            f"optimizer.name={name} stores {', '.join(sorted(tensors)) or 'nothing'} for a parameter and names "
            f"{', '.join(sorted(kind.moments)) or 'nothing'} as moments; name all of them, for checkpoints."
        )
    if odd := [k for k, v in tensors.items() if (v.shape, v.dtype) != (expected[k].shape, expected[k].dtype)]:
        raise ConfigError(
            f"optimizer.name={name} stores {', '.join(odd)} in another shape or type than float32 of the parameter's "
            "shape, or what its OptimizerKind's `state` makes; use these, or give `state`."
        )


OPTIMIZERS: Registry[OptimizerKind] = Registry(
    "optimizer.name",
    {
        "adamw": ADAMW,
        "adamw8bit": ADAMW_8BIT,
        "muon": MUON,
        "spectron": SPECTRON,
        "loro": LORO,
        "apollo_mini": APOLLO_MINI,
        "relora": RELORA,
    },
    _check_kind,
)


def kind_of(name: str, shape: Shape, settings: Optimizer) -> OptimizerKind:
    """The optimizer of one parameter: that of the settings if it has a rule for it, otherwise AdamW."""
    kind = OPTIMIZERS[settings.name]
    return kind if kind.takes(name, shape) else ADAMW


def check_optimizer(settings: Optimizer) -> None:
    """Raise `ConfigError` if `optimizer.name` is not known or other settings do not fit it."""
    if settings.name not in OPTIMIZERS:
        raise ConfigError(
            f"optimizer.name={settings.name} is not an optimizer; {nearest(settings.name, list(OPTIMIZERS))} Your own "
            "comes from --plugins MODULE."
        )
    kind, problems = OPTIMIZERS[settings.name], []
    read = kind.reads + SCHEDULES[settings.schedule]
    problems += [
        f"optimizer.{name}={getattr(settings, name)} does nothing with optimizer.name={settings.name} and "
        f"optimizer.schedule={settings.schedule}; leave {name} out."
        for name in OWN
        if name not in read and getattr(settings, name) != Optimizer.model_fields[name].default
    ]
    if settings.rates != "plain" and kind.own_rates:
        problems.append(
            f"optimizer.rates={settings.rates} does not work with optimizer.name={settings.name}, whose step sets the "
            "rates of A and B; leave rates out."
        )
    if settings.schedule == "restarts" and settings.restart_warmup_steps >= settings.restart_every:
        problems.append(
            f"optimizer.restart_warmup_steps={settings.restart_warmup_steps} leaves nothing of "
            f"optimizer.restart_every={settings.restart_every} for the cosine; use {settings.restart_every - 1} or "
            "fewer."
        )
    if problems:
        raise ConfigError(problems)


def check_taken(settings: Optimizer, shapes: Mapping[str, Shape]) -> None:
    """Raise `ConfigError` if the optimizer updates none of the trained parameters, or its rank does not fit them.

    `shapes`: Hugging Face name -> shape.
    """

    def fits(kind: OptimizerKind) -> bool:
        return any((kind.needs or kind.takes)(name, shape) for name, shape in shapes.items())

    kind = OPTIMIZERS.get(settings.name)
    if kind is not None and not fits(kind):
        others = [name for name, other in OPTIMIZERS.items() if fits(other)]
        raise ConfigError(
            f"optimizer.name={settings.name} updates {kind.what}, and this model trains none; use one of "
            f"{', '.join(others)}."
        )
    if kind is not None and "rank" in kind.reads:
        ranked = [(name, settings.rank, shape) for name, shape in shapes.items() if kind.takes(name, shape)]
        if problems := rank_problems("optimizer.rank", [(name, rank, (a, b)) for name, rank, (a, b) in ranked]):
            raise ConfigError(problems)
