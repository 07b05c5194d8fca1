"""The optimizer of a stage's parameters, what helps low-rank factors train, and the learning rate at a step.

`OPTIMIZERS` has them by name; a new one is a function and a line here, or in a plugin (`finhpc.plugins`).
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
    """How an optimizer is made, and the names of the tensors that it keeps for a parameter, which checkpoints hold."""

    make: Callable[[Groups, Optimizer], torch.optim.Optimizer]
    moments: tuple[str, ...]


def _adamw(groups: Groups, settings: Optimizer) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)


def _adamw8bit(groups: Groups, settings: Optimizer) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    made: torch.optim.Optimizer = AdamW8bit(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps)
    return made


def _check_kind(name: str, kind: Any) -> None:
    """Take one step with a small matrix: what the optimizer keeps for it must be what it says, or resuming loses it."""
    if not isinstance(kind, OptimizerKind):
        raise ConfigError(f"optimizer.name={name} must be a finhpc.training.optimizer.OptimizerKind.")
    parameter = nn.Parameter(torch.ones(4, 3))
    parameter.grad = torch.ones(4, 3)
    try:
        made = kind.make([{"params": [parameter], "weight_decay": 0.0, "lr_scale": 1.0}], Optimizer())
        made.step()
    except Exception as error:
        raise ConfigError(
            f"optimizer.name={name} takes no step ({type(error).__name__}: {error}); correct it."
        ) from None
    kept = {key: value for key, value in made.state[parameter].items() if isinstance(value, Tensor) and key != "step"}
    if set(kept) != set(kind.moments):
        raise ConfigError(
            f"optimizer.name={name} keeps {', '.join(sorted(kept)) or 'nothing'} for a parameter and names "
            f"{', '.join(sorted(kind.moments)) or 'nothing'} as moments; checkpoints must hold all of it."
        )
    if odd := [key for key, value in kept.items() if value.shape != parameter.shape or value.dtype != torch.float32]:
        raise ConfigError(
            f"optimizer.name={name} keeps {', '.join(odd)} in another shape or type than its parameter's."
        )


OPTIMIZERS: Registry[OptimizerKind] = Registry(
    "optimizer.name",
    {
        "adamw": OptimizerKind(_adamw, ("exp_avg", "exp_avg_sq")),
        # Moments of small tensors as AdamW's; of others with a scale for each 256 of them.
        "adamw8bit": OptimizerKind(_adamw8bit, ("exp_avg", "exp_avg_sq", "state1", "state2", "absmax1", "absmax2")),
    },
    _check_kind,
)


def check_optimizer(settings: Optimizer) -> None:
    """Raise `ConfigError` where `optimizer.name` is not known."""
    if settings.name not in OPTIMIZERS:
        raise ConfigError(
            f"optimizer.name={settings.name} is no optimizer; {nearest(settings.name, list(OPTIMIZERS))} One of your "
            "own comes from --plugins MODULE."
        )


def make_optimizer(named: dict[str, nn.Parameter], settings: Optimizer) -> torch.optim.Optimizer:
    """The optimizer of that name; weight decay on matrices only, never on biases and norms.

    `named`: Hugging Face name -> parameter; the factors of low-rank layers are called A and B.
    """
    chosen: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named.items():
        factor = name.removesuffix(".weight").rpartition(".")[2]
        scale = {"A": settings.lr_scale_a, "B": settings.lr_scale_b}.get(factor, 1.0)
        left_out = parameter.dim() < 2 or (factor in ("A", "B") and settings.decay == "product")
        chosen.setdefault((0.0 if left_out else settings.weight_decay, scale), []).append(parameter)
    groups = [{"params": p, "weight_decay": decay, "lr_scale": scale} for (decay, scale), p in chosen.items()]
    kind = OPTIMIZERS[settings.name]
    made = kind.make(groups, settings)
    made.moments = kind.moments  # type: ignore[attr-defined]
    return made


def moments_of(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Names of what an optimizer of `make_optimizer` keeps for a parameter, besides its step."""
    return optimizer.moments  # type: ignore[attr-defined,no-any-return]


def moments(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """What is kept for a parameter, by name, to be saved or overwritten in place; nothing before the first step."""
    names = moments_of(optimizer)
    return {name: value for name, value in optimizer.state[parameter].items() if name in names}


def begin_at(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Stand where `step` steps were taken, with every moment 0: `moments` are for the caller to fill."""
    for i, group in enumerate(optimizer.param_groups):
        for j, parameter in enumerate(group["params"]):
            state = optimizer.state[parameter]
            if hasattr(optimizer, "init_state"):  # bitsandbytes'
                optimizer.init_state(group, parameter, i, j)
                state["step"] = step
                continue
            on = parameter.device if parameter.device.type == "cuda" else None
            state["step"] = torch.tensor(float(step), device=on)
            for name in moments_of(optimizer):
                state[name] = torch.zeros_like(parameter)


def forget(optimizer: torch.optim.Optimizer, gone: Iterable[Tensor]) -> None:
    """Leave parameters out from now on, with what was kept for them; that of the others stays as it is."""
    names = {id(parameter) for parameter in gone}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) in names:
                optimizer.state.pop(parameter, None)
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in names]
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group of `make_optimizer` its share of the learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


@torch.no_grad()
def decay_products(pairs: Iterable[tuple[Tensor, Tensor]], strength: float) -> None:
    """Shrink every product B A by a gradient step on strength/2 ||B A||_F^2, in place.

    `pairs`: A (rank, in) and B (out, rank). Weight decay of a dense W is such a step on ||W||_F^2;
    decay of the factors is one on ||A||^2 + ||B||^2, which drives the product to lower rank (M.
    Khodak et al., "Initialization and Regularization of Factorized Neural Layers", 2021).
    """
    for a, b in pairs:
        gram_a, gram_b = a @ a.T, b.T @ b  # of both before either moves
        a.sub_(gram_b @ a, alpha=strength)
        b.sub_(b @ gram_a, alpha=strength)


def learning_rate(settings: Optimizer, step: int, steps: int) -> float:
    """Learning rate of the `step`-th (from 1) of `steps`: linear warm-up (at most half of them), then a cosine down."""
    warmup = settings.warmup(steps)
    if step <= warmup:
        return settings.lr * step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return settings.lr * (settings.min_lr_ratio + (1 - settings.min_lr_ratio) * cosine)
