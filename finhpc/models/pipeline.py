"""A Hugging Face model as a row of parts, cut into pipeline stages.

    model     embed | block 0              | block 1              | norm | head
    parts     embed | attention 0 | mlp 0  | attention 1 | mlp 1  | norm | head     from the family: modules + function
    costs       0   |     3       |   4    |     3       |   4    |   0  |  9       measured, or `estimated_cost`
    borders   0                            3                                  7     `stage_borders`, `cut`
    stages    [embed, attention 0, mlp 0]  [attention 1, mlp 1, norm, head]         a `PipelineLayer` per part

The row starts as modules of a skeleton without memory; a stage builds only its own layers, on its own device. All
parameters keep their Hugging Face names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from finhpc.lowrank.layers import LowRankLinear
from finhpc.lowrank.sltrain import multiplied, set_supports
from finhpc.models.derived import DerivedWeights
from finhpc.models.families.parts import BLOCK, LAYER, Compiled, Part, as_it_is
from finhpc.models.families.registry import family_of
from finhpc.models.initialize import Fill, fill_buffers
from finhpc.models.recompute import whole_blocks
from finhpc.settings.training import Precision, Recompute


class PipelineLayer(nn.Module):
    """One part of the model, built from the skeleton on the device it will run on.

    `fill` sets each module's first weights. With precision `bf16` the part runs under autocast. `derived` are the
    weights that it computes with, if they are not the trained ones: its caller sets them once for all passes of a
    step, otherwise every pass makes its own.
    """

    def __init__(
        self,
        part: Part,
        skeleton: nn.Module,
        device: torch.device,
        fill: Fill,
        precision: Precision = "fp32",
        bits: int = 16,
    ) -> None:
        super().__init__()
        self.part, self.autocast, self.device_type = part, precision == "bf16", device.type
        self.part_modules = nn.ModuleList(part.modules(skeleton))
        if any(parameter.is_meta for parameter in self.part_modules.parameters()):
            self.part_modules.to_empty(device=device)
            fill_buffers(skeleton, self.part_modules)
            for name, module in zip(part.names, self.part_modules, strict=True):
                fill(module, name)
            set_supports(self.part_modules)
        self.derived = DerivedWeights(self.part_modules, precision, bits)

    def forward(self, data: Any) -> Any:
        return self.run(self.part, data)

    def run(self, part: Part, data: Any) -> Any:
        with self.derived.once(), torch.autocast(self.device_type, dtype=torch.bfloat16, enabled=self.autocast):
            return part.run(data, *self.part_modules)

    def parameters_by_name(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (Hugging Face name, parameter) of every parameter of this part."""
        for prefix, module in zip(self.part.names, self.part_modules, strict=True):
            for name, parameter in module.named_parameters():
                yield f"{prefix}.{name}", parameter


def stored_by_inputs(layers: list[PipelineLayer]) -> set[str]:
    """Return the names of the weights of `Conv1D` layers, which are (in, out)."""
    return {
        f"{name}.weight"
        for layer in layers
        for prefix, part_module in zip(layer.part.names, layer.part_modules, strict=True)
        for name, module in part_module.named_modules(prefix=prefix)
        if isinstance(module, Conv1D)
    }


def residual_layers(layers: list[PipelineLayer]) -> dict[str, LowRankLinear]:
    """Return the low-rank layers in blocks, by the name of the weight of B: those that `method.init=dlr` is for."""
    blocks = [layer for layer in layers if layer.part.in_block]
    named = [pair for layer in blocks for pair in zip(layer.part.names, layer.part_modules, strict=True)]
    modules = [pair for prefix, module in named for pair in module.named_modules(prefix=prefix)]
    return {f"{name}.B.weight": module for name, module in modules if isinstance(module, LowRankLinear)}


def parts_of(config: Any, recompute: Recompute = "none", compiled: Compiled = as_it_is) -> list[Part]:
    """Return the parts of a model in forward order; a tied head uses the embedding's module again.

    With `full` recomputation whole blocks are parts, otherwise their halves. `compiled` compiles what a block runs.
    """
    row = family_of(config).parts(config)
    if recompute == "full":
        row = whole_blocks(row)
    runs = {part.run: compiled(part.run) for part in row if part.in_block}
    return [replace(part, run=runs.get(part.run, part.run)) for part in row]


def has_halves(config: Any, recompute: Recompute) -> bool:
    """Return whether stages may begin in the middle of a transformer block."""
    return recompute != "full" and not family_of(config).whole_layers


def is_tied(config: Any) -> bool:
    return bool(config.tie_word_embeddings)


def estimated_cost(part: Part, skeleton: nn.Module, seq_len: int) -> float:
    """Return the multiplications per token of a part's forward pass, which balance stages if nothing is measured.

    Attention adds its products of queries, keys and values. A recomputed block counts a third more: its forward pass is
    a third of its work and runs twice. The loss over the vocabulary counts 25 multiplications per word: on a CPU in
    float32 its passes over the logits took about 2.4 ns per word, forward and backward, when matrix products took
    0.1 ns per multiplication.
    """
    if part.kind in ("embedding", "positions", "dropout", "norm"):
        return 0.0
    weights = sum(multiplied(module) for module in part.modules(skeleton))
    config: Any = skeleton.config
    if part.kind in ("attention", LAYER):
        return weights + float(seq_len * config.hidden_size)
    if part.kind == BLOCK:
        return (weights + float(seq_len * config.hidden_size)) * 4 / 3
    if part.kind == "head":
        return weights + 25.0 * float(config.vocab_size)
    return float(weights)


def cut(costs: list[float], starts: list[int], stages: int) -> list[int]:
    """Return the borders [0, ..., len(costs)] of the contiguous cut whose most expensive stage is cheapest.

    Every stage except the first begins at one of `starts` (indices into `costs`). Exact: dynamic programming over the
    borders.
    """
    prefix = [0.0]
    for cost in costs:
        prefix.append(prefix[-1] + cost)
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [0])}  # end of the stages so far -> highest cost, borders
    ends = [starts] * (stages - 1) + [[len(costs)]]
    for borders in ends:
        longer = {}
        for border in borders:
            options = [
                (max(peak, prefix[border] - prefix[start]), path)
                for start, (peak, path) in best.items()
                if start < border
            ]
            if options:
                peak, path = min(options)
                longer[border] = (peak, [*path, border])
        best = longer
    return best[len(costs)][1]


def stage_borders(row: list[Part], costs: list[float], stages: int) -> list[int]:
    """Return where each stage begins and the last ends, balanced by `costs` of the parts of `row`, in any unit."""
    return cut(costs, borders_of(row), stages)


def borders_of(row: list[Part]) -> list[int]:
    """Return where stages after the first may begin: at any part inside the transformer blocks except the first, or
    right after the last block.
    """
    inner = [i for i, part in enumerate(row) if part.in_block]
    return [*inner[1:], inner[-1] + 1]


def estimated_costs(row: list[Part], skeleton: nn.Module, seq_len: int) -> list[float]:
    """Return `estimated_cost` of each part."""
    return [estimated_cost(part, skeleton, seq_len) for part in row]
