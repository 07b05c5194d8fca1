"""What an optimizer tells finhpc about itself, and how it recognizes parameters.

Parameters are recognized by their Hugging Face names: those of transformer blocks have a number in it, and the factors
of a low-rank layer or adapter are called A and B.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from sys import maxsize
from typing import Any, Literal

import torch
from torch import Tensor, nn

from finhpc.settings.training import Optimizer

# Each with its params, their names, weight_decay, lr_scale, and by_inputs: the names of those stored (in, out).
Groups = list[dict[str, Any]]
Shape = tuple[int, ...]
Takes = Callable[[str, Shape], bool]
Products = Callable[[str, Mapping[str, Shape], Optimizer], float]
State = Callable[[Tensor, Optimizer, int], dict[str, Tensor]]  # a parameter, the settings, steps taken -> tensors

# Settings of some optimizers or schedules, which are refused with the others.
OWN = ("momentum", "rank", "dense_cycles", "restart_every", "restart_warmup_steps", "cooldown_share")

_BLOCK = re.compile(r"\.(\d+|\*)\.")  # planning has a single block, which stands for all


def everything(name: str, shape: Shape) -> bool:
    """Whether a parameter is one at all."""
    return True


def block_matrix(name: str, shape: Shape) -> bool:
    """Whether a parameter is a matrix inside a transformer block: dense, or a factor of a pair."""
    return len(shape) == 2 and _BLOCK.search(name) is not None


def block_dense(name: str, shape: Shape) -> bool:
    """Whether a parameter is a dense matrix inside a transformer block."""
    return block_matrix(name, shape) and factor_of(name) is None


def block_factor(name: str, shape: Shape) -> bool:
    """Whether a parameter is A or B of a pair inside a transformer block."""
    return block_matrix(name, shape) and factor_of(name) is not None


def factor_of(name: str) -> str | None:
    """A or B if a parameter is that factor of a low-rank layer or adapter."""
    last = name.removesuffix(".weight").rpartition(".")[2]
    return last if last in ("A", "B") else None


def is_sparse(name: str) -> bool:
    """Whether a parameter has the entries of SLTrain's sparse matrix."""
    return name.endswith(".S")


def layer_of(name: str) -> str:
    """The name of the layer whose factor a parameter is; of other parameters, their own."""
    return name.removesuffix(".weight").rpartition(".")[0] if factor_of(name) else name


def pair_of(name: str) -> tuple[str, str]:
    """The names of A and B of the layer whose factor a parameter is."""
    ending = ".weight" if name.endswith(".weight") else ""
    return f"{layer_of(name)}.A{ending}", f"{layer_of(name)}.B{ending}"


def blocks_of(a: Shape, b: Shape) -> int:
    """How many pairs A (blocks x rank, in) and B (blocks x out, rank) contain; 0 for the pair of an embedding.

    A layer that has queries, keys and values apart has three pairs. An embedding's A is (tokens, rank).
    """
    return 0 if a[0] != b[1] == a[1] else a[0] // b[1]


@dataclass(frozen=True)
class Pair:
    """A and B of a layer or adapter, which may contain several pairs. `name`: of A; `group`: A's."""

    name: str
    a: nn.Parameter
    b: nn.Parameter
    group: dict[str, Any]

    def split(self, of_a: Tensor, of_b: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Views of each pair's part of A and B, or of tensors with their rows."""
        count = blocks_of(tuple(self.a.shape), tuple(self.b.shape))
        return list(zip(of_a.chunk(count), of_b.chunk(count), strict=True))


def pairs(groups: Groups) -> list[Pair]:
    """The pairs among the parameters of an optimizer that have gradients."""
    named = {name: (p, group) for group in groups for name, p in zip(group["names"], group["params"], strict=True)}
    found = []
    for name, (a, group) in named.items():
        if factor_of(name) == "A":
            b, _ = named[pair_of(name)[1]]
            if a.grad is not None and b.grad is not None:
                found.append(Pair(name, a, b, group))
    return found


def steps_taken(optimizer: torch.optim.Optimizer) -> int:
    """Return how many steps the state of an optimizer counts, of the parameter that has most; 0 before the first."""
    return int(max((float(state["step"]) for state in optimizer.state.values()), default=0))


@dataclass(frozen=True)
class OptimizerKind:
    """How to make an optimizer, and what it keeps.

    `make(groups, settings)` gets groups of parameters, each with `params`, their `names`, `weight_decay`, `lr_scale`
    and `by_inputs`. `moments` names the tensors that it keeps per parameter, which checkpoints contain; `state` makes
    those that exist after some steps, by default all of them as float32 zeros of the parameter's shape.

    `elementwise`: an element's step depends on nothing but that element's gradient and moments, which have the
    parameter's shape. Then replicas may divide a tensor among them; otherwise they divide whole tensors, and both
    factors of a layer go to one replica.

    `takes(name, shape)`: whether it has a rule for a parameter; AdamW updates the others. A model needs one of them,
    or of those that `needs` accepts; `what` describes these.

    `products(name, shapes, settings)`: the multiplications of a step's matrix products for the parameter `name`, in the
    `precision` of these products; `shapes`: of its whole layer, by name.

    `reads`: the settings in `OWN` that it reads; the others must keep their defaults. `own_rates`: its step sets the
    rates of A and B, so `optimizer.rates` is refused. `of_products`: its step changes A and B as factors of their
    product, so layers with something between A and B are refused.
    """

    make: Callable[[Groups, Optimizer], torch.optim.Optimizer]
    moments: tuple[str, ...]
    elementwise: bool = False
    takes: Takes = everything
    what: str = "every parameter"
    state: State | None = None
    needs: Takes | None = None
    products: Products = lambda name, shapes, settings: 0.0
    precision: Literal["fp32", "bf16"] = "fp32"
    reads: tuple[str, ...] = ()
    own_rates: bool = False
    of_products: bool = False

    def state_after(self, steps: int, parameter: Tensor, settings: Optimizer) -> dict[str, Tensor]:
        """The tensors of a parameter that exist after so many steps, as new ones, on its device."""
        if self.state is not None:
            return self.state(parameter, settings, steps)
        return {name: torch.zeros_like(parameter, dtype=torch.float32) for name in self.moments}

    def state_bytes(self, shape: Shape, settings: Optimizer) -> int:
        """The most bytes of the tensors of a parameter of that shape, in the first step or the last."""
        empty = torch.empty(shape, device="meta")
        states = (self.state_after(steps, empty, settings) for steps in (1, maxsize))
        return max(sum(tensor.nbytes for tensor in state.values()) for state in states)
