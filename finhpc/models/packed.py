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


@dataclass(frozen=True)
class Group:
    """Segments that attend alike: the same prefix, about the same length.

    `rows`: int64 (segments, longest), the rows of each, its last one repeated to the end. `own`: bool of the same
    shape, false for repeats; None where there are none. `prefix`: int64 (n,), the rows of the segment they all
    continue, none where they continue none.
    """

    rows: Tensor
    own: Tensor | None
    prefix: Tensor


@dataclass(frozen=True)
class Layout:
    """Where things are in a pack, made once and used by every layer.

    `targets`: int64 (n,), the rows that predict a token; `wanted`: int64 (n,), those tokens.
    `predicting`: `targets`, or row 0 where there are none: no layer is given an empty tensor. `scale`: what the sum of
    the pack's losses is multiplied by, so that the mean over all packs is the mean over all targets.
    """

    groups: list[Group]
    targets: Tensor
    wanted: Tensor
    predicting: Tensor
    scale: float
    parts: dict[Any, Any] = field(default_factory=dict)  # what layers made from it, such as rotary positions


_known: OrderedDict[bytes, Layout] = OrderedDict()
KEPT = 32  # layouts: micro-batches under way in a pipeline
WASTE = 1.25  # the longest segment of a group over its shortest


def layout_of(pack: Tensor) -> Layout:
    """The layout of a pack (1, FIELDS, T); those of the newest packs are kept, found by their content.

    The content, as stages receive their packs in buffers that are used again.
    """
    fields = pack.detach().cpu().contiguous()
    key = fields.numpy().tobytes() + str(pack.device).encode()
    found = _known.pop(key, None) or _parse(fields[0], pack.device)
    _known[key] = found
    while len(_known) > KEPT:
        _known.popitem(last=False)
    return found


def _parse(fields: Tensor, device: torch.device) -> Layout:
    segments, sizes = torch.unique_consecutive(fields[SEGMENT], return_counts=True)
    begins = (sizes.cumsum(0) - sizes).tolist()
    spans = {
        int(number): (begin, begin + int(size))
        for number, begin, size in zip(segments, begins, sizes, strict=True)
        if number
    }
    waiting: dict[int, list[tuple[int, int]]] = {}
    for begin, end in spans.values():
        waiting.setdefault(int(fields[PREFIX, begin]), []).append((begin, end))
    groups = []
    for before, alike in waiting.items():
        prefix = torch.arange(*spans[before]) if before else torch.empty(0, dtype=torch.int64)
        alike.sort(key=lambda span: span[1] - span[0])
        some: list[tuple[int, int]] = []
        for span in alike:
            if some and span[1] - span[0] > WASTE * (some[0][1] - some[0][0]):
                groups.append(_group(some, prefix, device))
                some = []
            some.append(span)
        groups.append(_group(some, prefix, device))
    targets = (fields[TARGET] != IGNORED).nonzero()[:, 0]
    scale = int(fields[PACKS, 0]) / max(1, int(fields[TARGETS, 0]))
    predicting = targets if len(targets) else torch.zeros(1, dtype=torch.int64)
    return Layout(groups, targets.to(device), fields[TARGET][targets].to(device), predicting.to(device), scale)


def _group(spans: list[tuple[int, int]], prefix: Tensor, device: torch.device) -> Group:
    begins, ends = (torch.tensor(x)[:, None] for x in zip(*spans, strict=True))
    rows = begins + torch.arange(int((ends - begins).max()))
    own = rows < ends
    whole = bool(own.all())
    return Group(torch.minimum(rows, ends - 1).to(device), None if whole else own.to(device), prefix.to(device))
