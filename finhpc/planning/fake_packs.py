"""What one pack takes in each part of an adapted model, counted by running its code on tensors without memory.

As `finhpc.planning.fake_passes` does for pretraining. Blocks between the first and the last are alike, so three are
counted for any number: the first one's input asks for no gradient, and the last one's second half sees the rows
alone that predict a token.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from finhpc.models.families.family import BLOCKS, Flow, Part
from finhpc.models.families.registry import skeleton, with_blocks
from finhpc.models.files.weights import Weights
from finhpc.models.lora.model import LoraModel, LoraPipelineLayer, Matrix
from finhpc.models.packing.layout import FIELDS, LAYOUT, Segments, build_layout, layout_of
from finhpc.models.pipeline import is_tied
from finhpc.planning.fake_passes import Meter, NextPart, PartBytes
from finhpc.quantization.frozen import FrozenLinear, hollow


@dataclass(frozen=True)
class AdaptedPart:
    """One part of the model. `weights_bytes`: of the frozen base; `trained`: parameters of its adapters.

    `given`, `gives`: bytes of the hidden states before and after it.
    """

    kind: str
    weights_bytes: int
    trained: int
    passes: PartBytes
    given: int
    gives: int


@dataclass(frozen=True)
class PackSize:
    """A pack as planning knows it: its `tokens` computed, and its segments."""

    tokens: int
    segments: Segments

    @property
    def pairs(self) -> float:
        """(query, key) pairs that attention multiplies; causality hides half of a segment's own."""
        found = 0.0
        for before, spans in self.segments.groups:
            prefix = before[1] - before[0] if before else 0
            found += sum((end - begin) * (prefix + (end - begin) / 2) for begin, end in spans)
        return found


class Shapes(Weights):
    """A base of which shapes alone are known."""

    def __init__(self, hf_config: Any) -> None:
        self.path, self.config, self.tied = Path(), hf_config, is_tied(hf_config)
        self.skeleton = skeleton(hf_config)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self.skeleton.state_dict().items()}

    def read(self, name: str) -> Tensor:
        """A tensor of that name's shape, in float32, without content."""
        return torch.empty(self.shapes[name])


class Hollow(LoraModel):
    """An lora_model that is counted, never trained: its frozen matrices have no content."""

    def _frozen(self, matrix: Matrix, bias: Tensor | None, device: torch.device) -> FrozenLinear:
        return hollow(matrix.shape, bias, self.bits_of(matrix.name), self.scheme, self.dtype)


def counted_parts(lora_model: LoraModel, pack: PackSize, cuda: bool) -> list[AdaptedPart]:
    """Every part of the model in order, for packs of that size.

    With `cuda` attention is torch's fused kernel and the loss makes its float32 copy, as on a GPU. A tied head's
    `weights_bytes` are 0, as if its stage held the embedding too.
    """
    layers = int(lora_model.hf_config.num_hidden_layers)
    counted = layers if not _alike(lora_model) else min(layers, 3)
    small = _with_blocks(lora_model, counted)
    row = _count(small, pack, cuda)
    inside = [i for i, part in enumerate(row) if part.kind in BLOCKS]
    per = len(inside) // counted
    first, last = row[: inside[0] + per], row[inside[-1] + 1 - per :]
    if layers == 1:
        return row
    middle = row[inside[0] + per : inside[-1] + 1 - per]
    return first + (middle * (layers - 2) if counted == 3 else middle) + last


def _alike(lora_model: LoraModel) -> bool:
    """Whether every block has the same layers and adapters."""
    if getattr(lora_model.hf_config, "low_rank_layers", None):
        return False
    blocks: dict[str, set[tuple[str, tuple[int, int]]]] = {}
    for name, shape in lora_model.targets.items():
        if found := re.search(r"\.(\d+)\.(.+)", name):
            blocks.setdefault(found[1], set()).add((found[2], shape))
    several = list(blocks.values())
    return all(some == several[0] for some in several) and len(several) in (0, lora_model.hf_config.num_hidden_layers)


def _with_blocks(lora_model: LoraModel, blocks: int) -> Hollow:
    small = Shapes(with_blocks(lora_model.hf_config, blocks))
    return Hollow(
        small, lora_model.lora, lora_model.quantization, lora_model.bf16, lora_model.recompute, lora_model.seed
    )


def _count(lora_model: Hollow, pack: PackSize, cuda: bool) -> list[AdaptedPart]:
    found = []
    width, size = int(lora_model.hf_config.hidden_size), lora_model.dtype.itemsize
    assert lora_model.skeleton is not None  # made now, on the meta device: not to be counted
    meter = Meter()
    with FakeTensorMode(), meter:
        data = torch.zeros(1, FIELDS, pack.tokens, dtype=torch.int64)
        setattr(data, LAYOUT, build_layout(pack.segments, data.device, fused=cuda))
        rows, given, asks = pack.tokens, 0, False
        for part in lora_model.parts():
            before = meter.live
            layer = LoraPipelineLayer(_as_on_gpu(part) if cuda else part, lora_model, data.device)
            held = meter.live - before
            trained = sum(p.numel() for _, p in layer.parameters_by_name())
            trial = _Trial(meter, layer, data, (1, rows, width), lora_model.dtype, asks)
            trial.passes()  # rotary positions, gradients of the adapters
            passes, rows, asks = trial.passes()
            gives = 0 if part.kind == "head" else rows * width * size
            found.append(AdaptedPart(part.kind, held - 4 * trained, trained, passes, given, gives))
            given = gives
    return found


@dataclass(frozen=True)
class _Trial:
    """Passes through one layer. `shape`: of the hidden states it is given; `asks`: whether for their gradient."""

    meter: Meter
    layer: LoraPipelineLayer
    data: Tensor
    shape: tuple[int, int, int]
    dtype: torch.dtype
    asks: bool

    def passes(self) -> tuple[PartBytes, int, bool]:
        """What a forward and a backward pass take; rows of what comes out, and whether it asks for a gradient."""
        meter = self.meter
        before = meter.live
        flow: Any = self.data if self.layer.part.kind == "embedding" else (self._input(), self.data)
        start = meter.peak = meter.live
        out = self.layer(flow)
        forward = meter.peak - start
        hidden = out if isinstance(out, Tensor) else out[0]
        rows = hidden.shape[1] if hidden.dim() else 0
        if not hidden.requires_grad:
            return PartBytes(kept=0, forward=forward, backward=0, first_backward=0), rows, False
        begin = meter.live
        gradient = torch.tensor(0.5) if hidden.dim() == 0 else torch.empty_like(hidden)
        root = NextPart.apply(hidden, gradient)  # type: ignore[no-untyped-call]
        handed = meter.live - begin
        del flow, out, hidden, gradient
        kept = meter.live - before - handed
        begin = meter.peak = meter.live
        root.backward()
        backward = meter.peak - begin
        return PartBytes(kept=kept, forward=forward, backward=backward, first_backward=backward), rows, True

    def _input(self) -> Tensor:
        """What another part would have made: where it asks for a gradient, not a leaf."""
        made = torch.empty(self.shape, dtype=self.dtype)
        return made + torch.zeros((), dtype=self.dtype, requires_grad=True) if self.asks else made


def _as_on_gpu(part: Part) -> Part:
    """With the loss of a GPU, which copies its logits in float32."""
    if part.kind != "head":
        return part

    def run(data: Flow, module: nn.Module) -> Tensor:
        hidden, pack = data
        weight = getattr(module, "weight", None)
        tied = isinstance(weight, Tensor) and not isinstance(module, FrozenLinear)
        logits = F.linear(hidden[0], weight) if tied else module(hidden[0])  # type: ignore[arg-type]
        return F.cross_entropy(logits.float(), layout_of(pack).wanted)

    return Part(part.names, part.kind, run)
