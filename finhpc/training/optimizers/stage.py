"""The optimizer of a stage's parameters: that of the settings for what it has a rule for, AdamW for the rest."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from finhpc.settings.training import Optimizer
from finhpc.training.optimizers.adamw import ADAMW
from finhpc.training.optimizers.kind import OptimizerKind, Shape, block_matrix, everything, factor_of, is_sparse
from finhpc.training.optimizers.rates import rate_of
from finhpc.training.optimizers.registry import OPTIMIZERS, kind_of


class StageOptimizer(torch.optim.Optimizer):
    """One or two optimizers as one, each with parameters of its own; they share their groups and state with it."""

    def __init__(self, parts: list[tuple[OptimizerKind, torch.optim.Optimizer]], settings: Optimizer) -> None:
        super().__init__([group for _, part in parts for group in part.param_groups], {})
        self.parts, self.settings = parts, settings
        for _, part in parts:
            self.state.update(part.state)
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for _, part in self.parts:
            part.step()


def make_optimizer(
    named: Mapping[str, nn.Parameter],
    settings: Optimizer,
    shapes: Mapping[str, Shape] | None = None,
    by_inputs: Collection[str] = (),
) -> StageOptimizer:
    """The optimizer of those parameters; weight decay is for matrices, never for biases and norms.

    `named`: Hugging Face name -> parameter, or some rows of it; the factors of low-rank layers are called A and B.
    `shapes`: of the whole parameters of the stage, if `named` are only some of them. `by_inputs`: the names of matrices
    that are stored (in, out).
    """
    shapes = shapes or {name: tuple(parameter.shape) for name, parameter in named.items()}
    kinds = {True: OPTIMIZERS[settings.name], False: ADAMW}
    rest = 1.0 if settings.lr_adamw is None else settings.lr_adamw / settings.lr
    groups: dict[bool, dict[tuple[float, float], dict[str, Any]]] = {True: {}, False: {}}
    for name, parameter in named.items():
        taken = kinds[True].takes(name, shapes[name])
        main = taken if kinds[True].takes is not everything else block_matrix(name, shapes[name])
        scale = rate_of(settings.rates, name, shapes) * (1.0 if main else rest)
        undecayed = parameter.dim() < 2 and not is_sparse(name)
        undecayed |= factor_of(name) is not None and settings.decay == "product"
        decay = 0.0 if undecayed else settings.weight_decay
        empty: dict[str, Any] = {"params": [], "names": [], "weight_decay": decay, "lr_scale": scale}
        empty["by_inputs"] = by_inputs
        group = groups[taken].setdefault((decay, scale), empty)
        group["params"].append(parameter)
        group["names"].append(name)
    parts = [(kinds[taken], kinds[taken].make(list(own.values()), settings)) for taken, own in groups.items() if own]
    return StageOptimizer(parts, settings)


def elementwise(shapes: Mapping[str, Shape], settings: Optimizer) -> set[str]:
    """The names of the parameters whose rows replicas may divide."""
    return {name for name, shape in shapes.items() if kind_of(name, shape, settings).elementwise}


def state_bytes(shapes: Iterable[tuple[str, Shape]], settings: Optimizer) -> int:
    """The bytes that the optimizer keeps for parameters: (Hugging Face name, shape)."""
    return sum(kind_of(name, shape, settings).state_bytes(shape, settings) for name, shape in shapes)


def product_operations(shapes: Iterable[Mapping[str, Shape]], settings: Optimizer) -> float:
    """Operations of the matrix products in a step of the optimizer; `shapes`: of each layer's parameters, by name."""
    kind = OPTIMIZERS[settings.name]
    each = (kind.products(n, own, settings) for own in shapes for n, shape in own.items() if kind.takes(n, shape))
    return 2 * sum(each)


def moment_names(optimizer: StageOptimizer) -> list[str]:
    """The names of the tensors that an optimizer has per parameter, besides its step."""
    return sorted({name for kind, _ in optimizer.parts for name in kind.moments})


def moments(optimizer: StageOptimizer, parameter: Tensor) -> dict[str, Tensor]:
    """A parameter's moments by name, to be saved or overwritten in place; empty before the first step."""
    names = moment_names(optimizer)
    return {name: value for name, value in optimizer.state[parameter].items() if name in names}


def init_state(optimizer: StageOptimizer, step: int) -> None:
    """Make the state of an optimizer that has taken `step` steps; the caller fills the moments."""
    for kind, part in optimizer.parts:
        for i, group in enumerate(part.param_groups):
            for j, parameter in enumerate(group["params"]):
                state = optimizer.state[parameter]
                if hasattr(part, "init_state"):  # bitsandbytes'
                    part.init_state(group, parameter, i, j)
                    state["step"] = step
                    continue
                on = parameter.device if parameter.device.type == "cuda" else None
                state["step"] = torch.tensor(float(step), device=on)
                state.update(kind.state_after(step, parameter.detach(), optimizer.settings))


def drop_parameters(optimizer: StageOptimizer, dropped: Iterable[Tensor]) -> None:
    """Remove parameters and their state; the state of the others is unchanged."""
    ids = {id(parameter) for parameter in dropped}
    for group in optimizer.param_groups:
        kept = [(n, p) for n, p in zip(group["names"], group["params"], strict=True) if id(p) not in ids]
        for parameter in group["params"]:
            if id(parameter) in ids:
                optimizer.state.pop(parameter, None)
        group["names"], group["params"] = [name for name, _ in kept], [parameter for _, parameter in kept]
    for some in (optimizer, *(part for _, part in optimizer.parts)):
        some.param_groups[:] = [group for group in some.param_groups if group["params"]]


def set_lr(optimizer: StageOptimizer, lr: float) -> None:
    """Set the learning rate of every group of `make_optimizer`, scaled by the group's factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
