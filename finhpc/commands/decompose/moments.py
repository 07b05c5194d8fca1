"""Second moments of the inputs of each linear layer of a dense model, over some text, part by part.

The weights of only one part are in memory at a time, and the hidden states of the text (4 bytes x samples x seq_len x
width).
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from finhpc.lowrank.blas import gram
from finhpc.models.families.parts import Part
from finhpc.models.files.weights import Weights
from finhpc.models.initialize import fill_buffers, weights_fill
from finhpc.models.pipeline import parts_of

BATCH = 4  # samples run together


def second_moments(
    weights: Weights, tokens: Tensor, wanted: Set[str], device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """Yield a dictionary per part: C (in, in) = mean of x x^T over all positions, float64 on the CPU, by layer name.

    `tokens`: int64 (samples, seq). `wanted`: Hugging Face names of linear layers; parts without any
    of them run but yield nothing. Layers of a part with the same input share one tensor.
    """
    flows: list[Any] = list(tokens.to(device).split(BATCH))
    left, fill = set(wanted), weights_fill(weights)
    for part in parts_of(weights.config):
        if not left:
            return
        if part.kind == "head":  # a tied head is not a linear layer, and its loss is not needed
            yield {"lm_head": _moment([hidden for hidden, _ in flows])}
            return
        modules = part.modules(weights.skeleton)
        for name, module in zip(part.names, modules, strict=True):
            fill_buffers(weights.skeleton, module.to_empty(device=device).eval())
            fill(module, name)
        inputs = Inputs(dict(zip(part.names, modules, strict=True)), left)
        with torch.no_grad():
            flows = [inputs.watch(part, flow, modules) for flow in flows]
        moments = inputs.moments()
        left -= set(moments)
        for module in modules:
            module.to("meta")
        if moments:
            yield moments


class Inputs:
    """Sums x x^T over the inputs of some layers while a part runs."""

    def __init__(self, modules: dict[str, nn.Module], wanted: Set[str]) -> None:
        self._sums: dict[str, Tensor] = {}
        self._positions: dict[str, int] = {}
        self._same: dict[str, str] = {}  # layer -> the layer that has the same sum
        self._last: tuple[Tensor, str] | None = None
        self._handles: list[RemovableHandle] = []
        for prefix, module in modules.items():
            for name, sub in module.named_modules(prefix=prefix):
                if name in wanted:
                    self._handles.append(sub.register_forward_pre_hook(self._hook(name)))

    def watch(self, part: Part, flow: Any, modules: list[nn.Module]) -> Any:
        self._last = None
        return part.run(flow, *modules)

    def moments(self) -> dict[str, Tensor]:
        """Return the means over all text, and stop watching."""
        for handle in self._handles:
            handle.remove()
        done = {name: _mirrored(total / self._positions[name]).cpu() for name, total in self._sums.items()}
        self._sums.clear()
        return {name: done[owner] for name, owner in self._same.items()}

    def _hook(self, name: str) -> Any:
        def before(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0]
            if self._last is not None and self._last[0] is x:  # as queries, keys and values
                self._same[name] = self._last[1]
                return
            self._last, self._same[name] = (x, name), name
            rows = x.reshape(-1, x.shape[-1])
            self._sums[name] = self._sums.get(name, 0) + gram(rows.T)
            self._positions[name] = self._positions.get(name, 0) + len(rows)

        return before


def _moment(hidden: list[Tensor]) -> Tensor:
    rows = sum(gram(x.reshape(-1, x.shape[-1]).T) for x in hidden)
    assert isinstance(rows, Tensor)
    return _mirrored(rows / sum(x.shape[0] * x.shape[1] for x in hidden)).cpu()


def _mirrored(lower: Tensor) -> Tensor:
    """Return the symmetric matrix of a lower triangle."""
    return lower.tril() + lower.tril(-1).T
