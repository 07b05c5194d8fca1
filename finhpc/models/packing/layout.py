"""How examples of different lengths travel through the pipeline: side by side in one row, each blind to the others.

A pack is int64 (1, FIELDS, T): T tokens, and what is said of each. A token sees the tokens before it, and itself, of
its own segment, and all of the segment it continues: a prefix that several examples share is there, and
computed, once. Without dropout that is exact.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

TOKEN = 0  # id
POSITION = 1  # place in its own example, from 0: what the model's positions are made of
SEGMENT = 2  # number of its segment, from 1; the tokens of a segment lie together; 0: padding
PREFIX = 3  # number of the segment that comes before its own; 0: none
TARGET = 4  # id that it is to predict, or IGNORED
TARGETS = 5  # targets of the whole step or evaluation, over all packs; the same number everywhere
PACKS = 6  # packs of the whole step or evaluation, over all replicas; the same number everywhere
FIELDS = 7

IGNORED = -100
Span = tuple[int, int]  # first row of a segment, and the one after its last


@dataclass(frozen=True)
class Group:
    """Segments that attend alike: the same prefix, about the same length (if not fused, within WASTE).

    `rows`: int64 (segments, longest), the rows of each, its last one repeated to the end. `own`: bool of the same
    shape, false for repeats; `places`: int64, where it is true, in `rows` laid flat; both None where there are no
    repeats. `prefix`: int64 (n,), the rows of the segment they all continue, none where they continue none.
    """

    spans: tuple[Span, ...]
    rows: Tensor
    own: Tensor | None
    places: Tensor | None
    prefix: Tensor


@dataclass(frozen=True)
class Layout:
    """Where things are in a pack, made once and used by every layer.

    `fused`: attention is torch's fused kernel, and groups are few and less alike, see `_by_prefix`.
    `targets`: int64 (n,), the rows that predict a token; `wanted`: int64 (n,), those tokens.
    `predicting`: `targets`, or row 0 where there are none: no layer is given an empty tensor. `scale`: what the sum of
    the pack's losses is multiplied by, so that the mean over all packs is the mean over all targets.
    """

    groups: list[Group]
    targets: Tensor
    wanted: Tensor
    predicting: Tensor
    scale: float
    fused: bool = False
    parts: dict[Any, Any] = field(default_factory=dict)  # what layers made from it, such as rotary positions

    def cut(self, index: int, segments: int) -> list[Group]:
        """Group `index` in pieces of so many segments."""
        group = self.groups[index]
        if len(group.spans) <= segments:
            return [group]
        key = ("cut", index, segments)
        if key not in self.parts:
            begins = range(0, len(group.spans), segments)
            self.parts[key] = [group_of(group.spans[i : i + segments], group.prefix) for i in begins]
        found: list[Group] = self.parts[key]
        return found


@dataclass(frozen=True)
class Segments:
    """What a layout is made from, in plain numbers. `groups`: the prefix's span or None, and the segments'."""

    groups: list[tuple[Span | None, list[Span]]]
    targets: list[int]
    wanted: list[int]
    scale: float


_known: OrderedDict[bytes, Layout] = OrderedDict()
CACHED_LAYOUTS = 32  # layouts: micro-batches under way in a pipeline
WASTE = 1.25  # the longest segment of a group over its shortest
LAYOUT = "finhpc_layout"  # attribute of a pack: its layout, once known; a pack without content brings it


def layout_of(pack: Tensor) -> Layout:
    """The layout of a pack (1, FIELDS, T), which must not change once it is known.

    The tensor remembers it: reading its content waits for a GPU. Those of the newest packs are kept too, found by
    their content, as the same pack comes back in another tensor.
    """
    if (own := getattr(pack, LAYOUT, None)) is not None:
        return own  # type: ignore[no-any-return]
    fields = pack.detach().cpu().contiguous()
    key = fields.numpy().tobytes() + str(pack.device).encode()
    found = _known.pop(key, None) or build_layout(segments_of(fields[0]), pack.device)
    _known[key] = found
    while len(_known) > CACHED_LAYOUTS:
        _known.popitem(last=False)
    setattr(pack, LAYOUT, found)
    return found


def segments_of(fields: Tensor) -> Segments:
    """What stands in a pack's fields (FIELDS, T), on the CPU."""
    segments, sizes = torch.unique_consecutive(fields[SEGMENT], return_counts=True)
    begins = (sizes.cumsum(0) - sizes).tolist()
    spans = {
        int(number): (begin, begin + int(size))
        for number, begin, size in zip(segments, begins, sizes, strict=True)
        if number
    }
    waiting: dict[int, list[Span]] = {}
    for begin, end in spans.values():
        waiting.setdefault(int(fields[PREFIX, begin]), []).append((begin, end))
    groups: list[tuple[Span | None, list[Span]]] = []
    for before, alike in waiting.items():
        prefix = spans[before] if before else None
        alike.sort(key=lambda span: span[1] - span[0])
        some: list[Span] = []
        for span in alike:
            if some and span[1] - span[0] > WASTE * (some[0][1] - some[0][0]):
                groups.append((prefix, some))
                some = []
            some.append(span)
        groups.append((prefix, some))
    targets = (fields[TARGET] != IGNORED).nonzero()[:, 0]
    scale = int(fields[PACKS, 0]) / max(1, int(fields[TARGETS, 0]))
    return Segments(groups, targets.tolist(), fields[TARGET][targets].tolist(), scale)


def build_layout(segments: Segments, device: torch.device, fused: bool | None = None) -> Layout:
    """The layout with its tensors on `device`; `fused`, by default, where that is a GPU."""
    fused = device.type == "cuda" if fused is None else fused
    groups = []
    for before, spans in _by_prefix(segments) if fused else segments.groups:
        prefix = torch.arange(*before or (0, 0), device=device)
        groups.append(group_of(tuple(spans), prefix))
    targets = torch.tensor(segments.targets, dtype=torch.int64, device=device)
    wanted = torch.tensor(segments.wanted, dtype=torch.int64, device=device)
    predicting = targets if segments.targets else torch.zeros(1, dtype=torch.int64, device=device)
    return Layout(groups, targets, wanted, predicting, segments.scale, fused)


def _by_prefix(segments: Segments) -> list[tuple[Span | None, list[Span]]]:
    """The groups merged as long as repeats stay fewer than rows: few calls are worth more to a GPU than few rows."""
    merged: list[tuple[Span | None, list[Span]]] = []
    for before, spans in segments.groups:  # those of a prefix follow one another, shorter segments first
        longest = max(end - begin for begin, end in spans)
        if merged and merged[-1][0] == before:
            together = merged[-1][1] + spans
            if longest * len(together) <= 2 * sum(end - begin for begin, end in together):
                merged[-1] = (before, together)
                continue
        merged.append((before, spans))
    return merged


def group_of(spans: tuple[Span, ...], prefix: Tensor) -> Group:
    """Segments by their [begin, end) in the pack; `prefix`: the rows that they continue."""
    device = prefix.device
    longest = max(end - begin for begin, end in spans)
    begins, ends = (torch.tensor(x, device=device)[:, None] for x in zip(*spans, strict=True))
    rows = begins + torch.arange(longest, device=device)
    if all(end - begin == longest for begin, end in spans):
        return Group(spans, rows, None, None, prefix)
    places = [i * longest + j for i, (begin, end) in enumerate(spans) for j in range(end - begin)]
    return Group(spans, torch.minimum(rows, ends - 1), rows < ends, torch.tensor(places, device=device), prefix)
