"""The optimizer of a stage's parameters, the decay of low-rank products, and the learning rate of a step.

`OPTIMIZERS` has the optimizers by name. A new one is a function and a row there, or in a plugin (`finhpc.plugins`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finhpc.errors import ConfigError
from finhpc.plugins import Registry
from finhpc.settings.base import nearest
from finhpc.settings.training import Optimizer

Groups = list[dict[str, Any]]  # each with its params, weight_decay and lr_scale


@dataclass(frozen=True)
class OptimizerKind:
    """How to make an optimizer, and the names of its tensors per parameter, which checkpoints contain.

    `elementwise`: an element's step depends on nothing but that element's gradient and moments, and the moments have
    the parameter's shape. Then replicas may divide a tensor among them; otherwise they divide whole tensors.
    """

    make: Callable[[Groups, Optimizer], torch.optim.Optimizer]
    moments: tuple[str, ...]
    elementwise: bool = False


def _adamw(groups: Groups, settings: Optimizer) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)


def _adamw8bit(groups: Groups, settings: Optimizer) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    optimizer: torch.optim.Optimizer = AdamW8bit(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps)
    return optimizer


def _check_kind(name: str, kind: Any) -> None:
    """Take a step with a small matrix: the optimizer's tensors must be those it names, or resuming would lose some."""
    if not isinstance(kind, OptimizerKind):
        raise ConfigError(f"optimizer.name={name} must be a finhpc.training.optimizer.OptimizerKind.")
    parameter = nn.Parameter(torch.ones(4, 3))
    parameter.grad = torch.ones(4, 3)
    try:
        optimizer = kind.make([{"params": [parameter], "weight_decay": 0.0, "lr_scale": 1.0}], Optimizer())
        optimizer.step()
    except Exception as error:
        raise ConfigError(
            f"optimizer.name={name} fails in its first step ({type(error).__name__}: {error}); correct it."
        ) from None
    state = optimizer.state[parameter].items()
    tensors = {key: value for key, value in state if isinstance(value, Tensor) and key != "step"}
    if set(tensors) != set(kind.moments):
        raise ConfigError(
            f"optimizer.name={name} stores {', '.join(sorted(tensors)) or 'nothing'} for a parameter and names "
            f"{', '.join(sorted(kind.moments)) or 'nothing'} as moments; name all of them, for checkpoints."
        )
    if odd := [key for key, value in tensors.items() if value.shape != parameter.shape or value.dtype != torch.float32]:
        raise ConfigError(
            f"optimizer.name={name} stores {', '.join(odd)} in another shape or type than the parameter's; use the "
            "same shape and float32."
        )


OPTIMIZERS: Registry[OptimizerKind] = Registry(
    "optimizer.name",
    {
        "adamw": OptimizerKind(_adamw, ("exp_avg", "exp_avg_sq"), elementwise=True),
        # Small tensors have AdamW's moments; others have 8-bit moments with a scale for each 256 of them.
        "adamw8bit": OptimizerKind(_adamw8bit, ("exp_avg", "exp_avg_sq", "state1", "state2", "absmax1", "absmax2")),
    },
    _check_kind,
)


def check_optimizer(settings: Optimizer) -> None:
    """Raise `ConfigError` if `optimizer.name` is not known."""
    if settings.name not in OPTIMIZERS:
        raise ConfigError(
            f"optimizer.name={settings.name} is not an optimizer; {nearest(settings.name, list(OPTIMIZERS))} Your own "
            "comes from --plugins MODULE."
        )


def make_optimizer(named: dict[str, nn.Parameter], settings: Optimizer) -> torch.optim.Optimizer:
    """The optimizer of that name; weight decay is for matrices, never for biases and norms.

    `named`: Hugging Face name -> parameter; the factors of low-rank layers are called A and B.
    """
    by_group: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named.items():
        factor = name.removesuffix(".weight").rpartition(".")[2]
        scale = {"A": settings.lr_scale_a, "B": settings.lr_scale_b}.get(factor, 1.0)
        undecayed = parameter.dim() < 2 or (factor in ("A", "B") and settings.decay == "product")
        by_group.setdefault((0.0 if undecayed else settings.weight_decay, scale), []).append(parameter)
    groups = [{"params": p, "weight_decay": decay, "lr_scale": scale} for (decay, scale), p in by_group.items()]
    kind = OPTIMIZERS[settings.name]
    optimizer = kind.make(groups, settings)
    optimizer.moments = kind.moments  # type: ignore[attr-defined]
    return optimizer


def moment_names(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """The names of the tensors that an optimizer of `make_optimizer` has per parameter, besides its step."""
    return optimizer.moments  # type: ignore[attr-defined,no-any-return]


def moments(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """A parameter's moments by name, to be saved or overwritten in place; empty before the first step."""
    names = moment_names(optimizer)
    return {name: value for name, value in optimizer.state[parameter].items() if name in names}


def init_state(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Make the state of an optimizer that has taken `step` steps, with moments of 0, which the caller fills."""
    for i, group in enumerate(optimizer.param_groups):
        for j, parameter in enumerate(group["params"]):
            state = optimizer.state[parameter]
            if hasattr(optimizer, "init_state"):  # bitsandbytes'
                optimizer.init_state(group, parameter, i, j)
                state["step"] = step
                continue
            on = parameter.device if parameter.device.type == "cuda" else None
            state["step"] = torch.tensor(float(step), device=on)
            for name in moment_names(optimizer):
                state[name] = torch.zeros_like(parameter)


def drop_parameters(optimizer: torch.optim.Optimizer, dropped: Iterable[Tensor]) -> None:
    """Remove parameters and their state; the state of the others is unchanged."""
    ids = {id(parameter) for parameter in dropped}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) in ids:
                optimizer.state.pop(parameter, None)
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in ids]
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group of `make_optimizer`, scaled by the group's factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


@torch.no_grad()
def decay_products(pairs: Iterable[tuple[Tensor, Tensor]], strength: float) -> None:
    """Shrink every product B A by a gradient step on strength/2 ||B A||_F^2, in place.

    `pairs`: A (rank, in) and B (out, rank), or several of one shape stacked. Weight decay of a dense W is such a step
    on ||W||_F^2; decay of the factors is one on ||A||^2 + ||B||^2, which pulls the product to lower rank (M. Khodak et
    al., "Initialization and Regularization of Factorized Neural Layers", 2021).
    """
    for a, b in pairs:
        gram_a, gram_b = a @ a.mT, b.mT @ b  # both before either changes
        a.sub_(gram_b @ a, alpha=strength)
        b.sub_(b @ gram_a, alpha=strength)


def learning_rate(settings: Optimizer, step: int, steps: int) -> float:
    """The learning rate of a step (from 1 to `steps`): a linear warm-up, at most half of them, then a cosine decay."""
    warmup = settings.warmup(steps)
    if step <= warmup:
        return settings.lr * step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return settings.lr * (settings.min_lr_ratio + (1 - settings.min_lr_ratio) * cosine)
