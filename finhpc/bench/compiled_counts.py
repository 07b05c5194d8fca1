"""The launches of compiled graphs, for `finhpc bench step`, on a machine without a GPU.

torch.compile fuses operations into kernels before it writes code for a device. Two blocks of the model are compiled for
the CPU and train one step, in which the kernels of each graph's forward and backward pass are counted after fusion. In
the step on the pretended GPU each compiled function is then one operation with so many launches. Fusion for a GPU has
more choices (such as sums over other dimensions), so the counts are close to those of a GPU, not equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from finhpc.bench.counts import CountingMode, Counts
from finhpc.training import engine
from finhpc.training.compiler import Compiler

GRAPHS = "compiled graphs"  # the kind of their launches
Key = tuple[str, bool]  # a function's name, and whether its input has a gradient: the first block's may not


class Kernels(NamedTuple):
    """Kernels of a graph's passes."""

    forward: int
    backward: int


class FusedCounter(Compiler):
    """Compiles anew, and counts the kernels of each function's graph as it is compiled."""

    kernels: dict[Key, Kernels]

    def __call__(self, function: Any) -> Any:
        compiled = super().__call__(function)

        def run(*args: Any) -> Any:
            key = _key(function, args)
            if key in self.kernels:
                return compiled(*args)
            graphs: list[tuple[bool, int]] = []
            with torch._inductor.config.patch(_post_fusion_custom_pass=_count_into(graphs), force_disable_caches=True):
                out = compiled(*args)
            passes = dict(graphs)
            assert len(passes) == len(graphs), f"{key[0]} is more than one graph"
            self.kernels[key] = Kernels(passes[False], passes.get(True, 0))
            return out

        return run


def count_kernels(step: Callable[[], object]) -> dict[Key, Kernels]:
    """Return the kernels of each compiled function's graph in `step`, which makes a compiling engine and trains it."""
    torch._dynamo.reset()
    kernels: dict[Key, Kernels] = {}
    with patch.object(engine, "Compiler", FusedCounter), patch.object(FusedCounter, "kernels", kernels, create=True):
        step()
    return kernels


def _count_into(graphs: list[tuple[bool, int]]) -> Callable[[list[Any]], list[Any]]:
    from torch._inductor.ir import MultiOutput
    from torch._inductor.scheduler import NopKernelSchedulerNode
    from torch._inductor.virtualized import V

    def count(nodes: list[Any]) -> list[Any]:
        launched = [
            node
            for node in nodes
            if not isinstance(node, NopKernelSchedulerNode) and not isinstance(getattr(node, "node", None), MultiOutput)
        ]
        graphs.append((V.graph.is_backward, len(launched)))
        return nodes

    return count


@contextmanager
def as_graphs(mode: CountingMode, kernels: dict[Key, Kernels]) -> Iterator[None]:
    """Engines that are made in the block count each compiled function as its graph."""

    def compiler(*_: Any) -> Any:
        return lambda function: _as_graph(function, mode, kernels)

    with patch.object(engine, "Compiler", compiler):
        yield


def _as_graph(function: Any, mode: CountingMode, kernels: dict[Key, Kernels]) -> Any:
    def run(*args: Any) -> Any:
        leaves, spec = tree_flatten(args)
        at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        weights = [weight for leaf in leaves if isinstance(leaf, nn.Module) for weight in _trained(leaf)]
        shape: list[Any] = []

        def work(inputs: tuple[Tensor, ...]) -> list[Tensor]:
            values = list(leaves)
            for i, value in zip(at, inputs, strict=True):
                values[i] = value
            out, how = tree_flatten(function(*tree_unflatten(values, spec)))
            shape[:] = [how]
            return out

        out = _Graph.apply(  # type: ignore[no-untyped-call]
            work, mode, kernels[_key(function, args)], len(at), *(leaves[i] for i in at), *weights
        )
        return tree_unflatten(list(out), shape[0])

    return run


class _Graph(torch.autograd.Function):
    """Runs a function without counting it, and counts the launches of its graph in its place."""

    @staticmethod
    def forward(
        ctx: Any, work: Any, mode: CountingMode, kernels: Kernels, inputs: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.mode, ctx.kernels = mode, kernels
        with _instead(mode, kernels.forward), torch.enable_grad():
            own = [x.detach().requires_grad_(x.requires_grad) for x in tensors[:inputs]]
            ctx.sources = [*own, *tensors[inputs:]]
            ctx.out = work(tuple(own))
            results = tuple(x.detach() for x in ctx.out)
        ctx.mark_non_differentiable(*(x for x in results if not x.is_floating_point()))
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        ends = [(x, grad) for x, grad in zip(ctx.out, grads, strict=True) if x.requires_grad and grad is not None]
        wanted = [x for x in ctx.sources if x.requires_grad]
        with _instead(ctx.mode, ctx.kernels.backward):
            found = iter(torch.autograd.grad([x for x, _ in ends], wanted, [g for _, g in ends], allow_unused=True))
        return None, None, None, None, *(next(found) if x.requires_grad else None for x in ctx.sources)


@contextmanager
def _instead(mode: CountingMode, launches: int) -> Iterator[None]:
    """Count so many launches in place of the block's, whose waits count."""
    counts, mode.counts = mode.counts, Counts()
    try:
        yield
    finally:
        counts.waits += mode.counts.waits
        mode.counts = counts
        counts.launches[GRAPHS] += launches
        counts.operations[GRAPHS] += launches


def _key(function: Any, args: Any) -> Key:
    floats = [x for x in tree_leaves(args) if isinstance(x, Tensor) and x.is_floating_point()]
    return function.__name__, any(x.requires_grad for x in floats)


def _trained(module: nn.Module) -> Iterator[Tensor]:
    """The weights with a gradient that a module computes with, which may be derived from its parameters."""
    for sub in module.modules():
        for name in sub._parameters:
            weight = getattr(sub, name)
            if weight is not None and weight.requires_grad:
                yield weight
