"""The memory of one pack of examples in each part of a LoRA model, measured by running its code on fake tensors.

The counterpart of `finhpc.planning.fake_passes` for finetuning. The blocks between the first and the last are alike,
so three stand for any number: the first one's input requires no gradient, and the second half of the last one only
sees the rows that predict a token.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from finhpc.models.families.parts import BLOCKS
from finhpc.models.families.registry import family_of, skeleton, with_blocks
from finhpc.models.files.weights import Weights
from finhpc.models.lora.model import LoraModel, LoraPipelineLayer, Matrix
from finhpc.models.packing.layout import CHOICE_FIELDS, FIELDS, LAYOUT, Segments, build_layout
from finhpc.models.pipeline import is_tied
from finhpc.planning.fake_passes import Meter, PartBytes, run_passes
from finhpc.quantization.frozen import FrozenFloat, FrozenLinear
from finhpc.quantization.schemes import SCHEMES, is_quantized


@dataclass(frozen=True)
class LoraPart:
    """One part of the model, in bytes: its frozen weights, its passes, and the hidden states before and after it.

    `adapters`: the name and shape of each factor of its adapters.
    """

    kind: str
    weights_bytes: int
    adapters: tuple[tuple[str, tuple[int, ...]], ...]
    passes: PartBytes
    input_bytes: int
    output_bytes: int

    @property
    def trained(self) -> int:
        """The number of parameters of its adapters."""
        return sum(math.prod(shape) for _, shape in self.adapters)


@dataclass(frozen=True)
class PackSize:
    """A pack as planning sees it: the number of `tokens` that are computed, and its segments."""

    tokens: int
    segments: Segments

    @property
    def fields(self) -> int:
        return FIELDS + (0 if self.segments.choices is None else CHOICE_FIELDS)

    @property
    def pairs(self) -> float:
        """The (query, key) pairs that attention multiplies; causality hides half of a segment's own."""
        total = 0.0
        for before, spans in self.segments.groups:
            prefix = before[1] - before[0] if before else 0
            total += sum((end - begin) * (prefix + (end - begin) / 2) for begin, end in spans)
        return total


class Shapes(Weights):
    """A base of which only the shapes are known."""

    def __init__(self, hf_config: Any) -> None:
        self.path, self.config, self.tied = Path(), hf_config, is_tied(hf_config)
        self.family = family_of(hf_config)
        self.skeleton = skeleton(hf_config)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self.skeleton.state_dict().items()}

    def read(self, name: str) -> Tensor:
        """A float32 tensor of that name's shape, without content."""
        return torch.empty(self.shapes[name])


class EmptyLoraModel(LoraModel):
    """A LoRA model that is counted and never trained: its frozen matrices have no content."""

    def _frozen(self, matrix: Matrix, bias: Tensor | None, device: torch.device) -> FrozenLinear:
        bits = self.bits_of(matrix.name)
        if not is_quantized(matrix.shape, bits, self.scheme):
            return FrozenFloat(torch.empty(matrix.shape, dtype=self.dtype), bias)
        return SCHEMES[self.scheme].empty(matrix.shape, bias, bits)

    def _of_rounding(self, matrix: Matrix, frozen: FrozenLinear) -> tuple[Tensor, Tensor]:
        rank, (out, into) = self.lora.rank, matrix.shape
        return torch.empty(rank, into), torch.empty(out, rank)


def count_lora_parts(lora_model: LoraModel, pack: PackSize, cuda: bool) -> list[LoraPart]:
    """Every part of the model in order, for packs of that size.

    With `cuda` attention is torch's fused kernel and the loss takes more rows at a time, as on a GPU. The
    `weights_bytes` of a tied head are 0, as if its stage had the embedding too.
    """
    layers = int(lora_model.hf_config.num_hidden_layers)
    counted = min(layers, 3) if _blocks_are_alike(lora_model) else layers
    shapes = Shapes(with_blocks(lora_model.hf_config, counted))
    lora = lora_model.lora.model_copy(update={"path": None})  # its adapter has all layers of the model
    quantization, recompute = lora_model.quantization, lora_model.recompute
    row = _count(EmptyLoraModel(shapes, lora, quantization, lora_model.bf16, recompute, lora_model.seed), pack, cuda)
    inside = [i for i, part in enumerate(row) if part.kind in BLOCKS]
    per_block = len(inside) // counted
    if layers == 1:
        return row
    begin, end = inside[0] + per_block, inside[-1] + 1 - per_block
    middle = row[begin:end]
    return row[:begin] + (middle * (layers - 2) if counted == 3 else middle) + row[end:]


def _blocks_are_alike(lora_model: LoraModel) -> bool:
    if getattr(lora_model.hf_config, "low_rank_layers", None):
        return False
    blocks: dict[str, set[tuple[str, tuple[int, int]]]] = {}
    for name, shape in lora_model.targets.items():
        if match := re.search(r"\.(\d+)\.(.+)", name):
            blocks.setdefault(match[1], set()).add((match[2], shape))
    several = list(blocks.values())
    return all(some == several[0] for some in several) and len(several) in (0, lora_model.hf_config.num_hidden_layers)


def _count(lora_model: EmptyLoraModel, pack: PackSize, cuda: bool) -> list[LoraPart]:
    width, dtype = int(lora_model.hf_config.hidden_size), lora_model.dtype
    assert lora_model.skeleton is not None  # made here, on the meta device, so that it is not counted
    counted, meter = [], Meter("cuda" if cuda else "cpu")
    with FakeTensorMode(), meter:
        data = torch.zeros(1, pack.fields, pack.tokens, dtype=torch.int64)
        setattr(data, LAYOUT, build_layout(pack.segments, data.device, fused=cuda))
        rows, input_bytes, requires_grad = pack.tokens, 0, False
        for part in lora_model.parts():
            before = meter.live
            layer = LoraPipelineLayer(part, lora_model, data.device)
            trained_bytes = sum(p.nbytes for _, p in layer.parameters_by_name())
            weights_bytes = meter.live - before - trained_bytes
            adapters = tuple((name, tuple(p.shape)) for name, p in layer.parameters_by_name())

            def make_input(
                kind: str = part.kind, shape: tuple[int, int, int] = (1, rows, width), leaf: bool = not requires_grad
            ) -> Any:
                if kind == "embedding":
                    return data
                hidden = torch.empty(shape, dtype=dtype)
                return hidden if leaf else hidden + torch.zeros((), dtype=dtype, requires_grad=True), data

            run_passes(meter, layer, make_input)  # makes rotary positions and the adapters' gradients
            passes, rows, requires_grad = run_passes(meter, layer, make_input)
            output_bytes = 0 if part.kind == "head" else rows * width * dtype.itemsize
            counted.append(LoraPart(part.kind, weights_bytes, adapters, passes, input_bytes, output_bytes))
            input_bytes = output_bytes
    return counted
