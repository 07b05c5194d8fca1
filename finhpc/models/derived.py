"""Weights that are made from the trained ones once per step: rounded to 8 or 4 bits, cast to bfloat16, or both.

Every micro-batch of a step computes with the same tensors, and their gradients pass on to the trained float32 weights,
in which they are summed. So a cast or a rounding costs the same for one micro-batch as for many, and a compiled graph
does not contain it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from finhpc.quantization.fake import matrices, rounded_weight
from finhpc.settings.training import Precision


class DerivedWeights:
    """The derived weights of some modules.

    While they are set, `module.weight` is the derived tensor, and `module.named_parameters()` has the trained one. With
    `bits` below 16 every matrix is rounded. With precision `bf16` the parameters of linear layers are cast, as autocast
    does on each use; with `bf16-weights` all parameters are. A module with a method
    `derive(name, weight)` makes some of its weights itself.
    """

    def __init__(self, modules: nn.Module, precision: Precision, bits: int = 16) -> None:
        self.modules, self.precision, self.bits = modules, precision, bits
        self.are_set = False

    def set(self) -> None:
        """Make them from the trained weights as they are now."""
        set_derived([self])

    def _sources(self) -> Iterator[tuple[nn.Module, str, Tensor, bool]]:
        """Yield the module and name of each derived weight, what it is made of, and whether that is cast."""
        for module in self.modules.modules():
            for name, weight in module.named_parameters(recurse=False):
                source: Tensor = weight
                if (derive := getattr(module, "derive", None)) and (made := derive(name, weight)) is not None:
                    yield module, name, made, False
                    continue
                if self.bits < 16 and name in matrices(module):
                    source = rounded_weight(module, weight, self.bits)
                casts = self.precision == "bf16-weights" or (self.precision == "bf16" and _casts(module))
                if source is not weight or casts:
                    yield module, name, source, casts and source.dtype != torch.bfloat16

    def drop(self) -> None:
        """Forget them: the modules compute with the trained weights again."""
        for module in self.modules.modules():
            for name in module._parameters:
                module.__dict__.pop(name, None)
        self.are_set = False

    @contextmanager
    def once(self) -> Iterator[None]:
        """Set them for one pass, unless they are set for a whole step."""
        mine = not self.are_set
        if mine:
            self.set()
        try:
            yield
        finally:
            if mine:
                self.drop()


def set_derived(every: Sequence[DerivedWeights]) -> None:
    """Make all derived weights; a GPU casts them in one launch, and casts the gradients of each of `every` in one."""
    plans = [list(derived._sources()) for derived in every]
    wide = [source.detach() for plan in plans for *_, source, casts in plan if casts]
    narrow = [torch.empty_like(source, dtype=torch.bfloat16) for source in wide]
    if wide:
        torch._foreach_copy_(narrow, wide)
    made = iter(narrow)
    for derived, plan in zip(every, plans, strict=True):
        weights = [next(made) if casts else source for *_, source, casts in plan]
        trained = [i for i, (*_, source, casts) in enumerate(plan) if casts and source.requires_grad]
        if trained:
            outs = _Cast.apply([weights[i] for i in trained], *(plan[i][2] for i in trained))  # type: ignore[no-untyped-call]
            for i, out in zip(trained, outs, strict=True):
                weights[i] = out
        for (module, name, *_), weight in zip(plan, weights, strict=True):
            module.__dict__[name] = weight  # found before the parameter of that name
        derived.are_set = True


class _Cast(torch.autograd.Function):
    """Gives float32 weights the gradients of their casts, which exist already."""

    @staticmethod
    def forward(ctx: Any, casts: list[Tensor], *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(casts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        narrow = [grad for grad in grads if grad is not None]
        wide = [torch.empty_like(grad, dtype=torch.float32) for grad in narrow]
        torch._foreach_copy_(wide, narrow)
        made = iter(wide)
        return None, *(None if grad is None else next(made) for grad in grads)


def _casts(module: nn.Module) -> bool:
    """Return whether a module casts its own parameters to the type of its inputs."""
    return isinstance(module, nn.Linear | Conv1D) or getattr(module, "casts_parameters", False)
