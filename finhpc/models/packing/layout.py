"""Sequence packing: examples of different lengths share one row of tokens, and none sees another.

A pack is an int64 tensor (1, FIELDS, T): T tokens with their properties. A token sees itself, the tokens before it in
its own segment, and the whole segment that its segment continues. So a prefix that several examples share is stored and
computed once; without dropout that is exact.

A pack whose examples choose among candidate answers is (1, FIELDS + CHOICE_FIELDS, T). Column j of the additional
fields is the j-th token of any candidate, and the j-th candidate; they have nothing to do with token j of the pack.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

TOKEN = 0  # id
POSITION = 1  # in its own example, from 0
SEGMENT = 2  # number of its segment, from 1; the tokens of a segment are adjacent; 0: padding
PREFIX = 3  # number of the segment that its segment continues; 0: none
TARGET = 4  # id that it predicts, or IGNORED
TARGETS = 5  # targets of the whole step or evaluation, over all packs; the same number for every token
PACKS = 6  # packs of the whole step or evaluation, over all replicas; the same number for every token
FIELDS = 7

# Of a candidate's token:
ROW = 7  # the token of the pack that predicts it, from 1; 0: there are no more
TOKEN_ID = 8
CANDIDATE = 9  # number of its candidate
LATER = 10  # 1: it is not its candidate's first one
# Of a candidate:
EXAMPLE = 11  # number of its example, from 1; 0: there are no more
PLACE = 12  # its place among the candidates of its example
SHARE = 13  # what its example wants of it; this and the next two are the bits of a float64
SCALE = 14  # its score is its log-likelihood times this,
OFFSET = 15  # minus this
CHOICE_FIELDS = 9

IGNORED = -100
Span = tuple[int, int]  # first row of a segment, and the one after its last


@dataclass(frozen=True)
class SegmentGroup:
    """Segments that are computed together: they have the same prefix and similar lengths (if not fused, within WASTE).

    `rows`: int64 (segments, longest), the rows of each segment, its last one repeated to the end. `own`: bool of the
    same shape, false for repeats; `places`: int64, the indices of its true entries in `rows` flattened; both are None
    without repeats. `before`: the segment that they all continue, if there is one; `prefix`: int64 (n,), its rows.
    """

    spans: tuple[Span, ...]
    before: Span | None
    rows: Tensor
    own: Tensor | None
    places: Tensor | None
    prefix: Tensor


@dataclass(frozen=True)
class Candidates:
    """The answers that the examples of a pack choose among.

    For each token of a candidate: `rows`, its place in the rows that predict a token; `tokens`, its id; `of`, its
    candidate. `later`: the tokens that are not the first of their candidate. For each candidate: its `example`, its
    `place` among those of its example, and `shares`, what the example wants of it. Its score is its log-likelihood
    times `scales`, minus `offsets`.
    """

    rows: Tensor
    tokens: Tensor
    of: Tensor
    later: Tensor
    example: Tensor
    place: Tensor
    shares: Tensor
    examples: int
    most: int  # candidates of an example
    scales: Tensor | float = 1.0
    offsets: Tensor | float = 0.0


@dataclass(frozen=True)
class Layout:
    """The structure of a pack, built once and used by every layer.

    `fused`: attention uses torch's fused kernel, with fewer groups of more different lengths, see `_by_prefix`.
    `targets`: int64 (n,), the rows that predict a token; `wanted`: int64 (n,), those tokens.
    `predicting`: `targets`, or row 0 if there are none: no layer gets an empty tensor. `scale`: the factor of the sum
    of the pack's losses that makes the mean over all packs the mean over all targets.
    """

    groups: list[SegmentGroup]
    targets: Tensor
    wanted: Tensor
    predicting: Tensor
    scale: float
    fused: bool = False
    candidates: Candidates | None = None
    cache: dict[Any, Any] = field(default_factory=dict)  # values that layers derive from it, such as rotary positions

    def cut(self, index: int, segments: int) -> list[SegmentGroup]:
        """Return group `index` in pieces of at most so many segments."""
        group = self.groups[index]
        if len(group.spans) <= segments:
            return [group]
        key = ("cut", index, segments)
        if key not in self.cache:
            begins = range(0, len(group.spans), segments)
            self.cache[key] = [group_of(group.spans[i : i + segments], group.before, group.rows.device) for i in begins]
        return self.cache[key]  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Choices:
    """`Candidates` in plain numbers."""

    rows: list[int]
    tokens: list[int]
    of: list[int]
    later: list[int]
    example: list[int]
    place: list[int]
    shares: list[float]
    scales: list[float]
    offsets: list[float]


@dataclass(frozen=True)
class Segments:
    """A layout in plain numbers. `groups`: (the prefix's span or None, the segments' spans)."""

    groups: list[tuple[Span | None, list[Span]]]
    targets: list[int]
    wanted: list[int]
    scale: float
    choices: Choices | None = None


_recent: OrderedDict[bytes, Layout] = OrderedDict()
CACHED_LAYOUTS = 32  # at least the micro-batches in flight in a pipeline
WASTE = 1.25  # the longest segment of a group over its shortest
LAYOUT = "finhpc_layout"  # attribute of a pack: its layout, once computed; planning sets it on packs without content


class Pack(Tensor):
    """A pack on its device, with its layout. Nothing changes a pack, so it is its own copy, with the layout too."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def clone(self, *_: Any, **__: Any) -> Pack:  # type: ignore[override]
        return self

    def detach(self) -> Pack:  # type: ignore[override]
        return self

    def to(self, *_: Any, **__: Any) -> Pack:  # type: ignore[override]
        return self


def pack_on(pack: Tensor, device: torch.device) -> Pack:
    """Copy a pack from the host to a GPU, with its layout, without waiting for the GPU."""
    moved = pack.pin_memory().to(device, non_blocking=True).as_subclass(Pack)
    setattr(moved, LAYOUT, build_layout(segments_of(pack[0]), device))
    return moved


def layout_of(pack: Tensor) -> Layout:
    """Return the layout of a pack (1, FIELDS, T), whose content must not change afterwards.

    It is stored on the tensor, because reading the content waits for a GPU. The layouts of the newest packs are also
    cached by content, because the same pack may return in another tensor.
    """
    if (own := getattr(pack, LAYOUT, None)) is not None:
        return own  # type: ignore[no-any-return]
    fields = pack.detach().cpu().contiguous()
    key = fields.numpy().tobytes() + str(pack.device).encode()
    layout = _recent.pop(key, None) or build_layout(segments_of(fields[0]), pack.device)
    _recent[key] = layout
    while len(_recent) > CACHED_LAYOUTS:
        _recent.popitem(last=False)
    setattr(pack, LAYOUT, layout)
    return layout


def segments_of(fields: Tensor) -> Segments:
    """Read the segments from a pack's fields (FIELDS, T), on the CPU."""
    segments, sizes = torch.unique_consecutive(fields[SEGMENT], return_counts=True)
    begins = (sizes.cumsum(0) - sizes).tolist()
    spans = {
        int(number): (begin, begin + int(size))
        for number, begin, size in zip(segments, begins, sizes, strict=True)
        if number
    }
    by_prefix: dict[int, list[Span]] = {}
    for begin, end in spans.values():
        by_prefix.setdefault(int(fields[PREFIX, begin]), []).append((begin, end))
    groups: list[tuple[Span | None, list[Span]]] = []
    for before, continuing in by_prefix.items():
        prefix = spans[before] if before else None
        continuing.sort(key=lambda span: span[1] - span[0])
        similar: list[Span] = []
        for span in continuing:
            if similar and span[1] - span[0] > WASTE * (similar[0][1] - similar[0][0]):
                groups.append((prefix, similar))
                similar = []
            similar.append(span)
        groups.append((prefix, similar))
    targets = (fields[TARGET] != IGNORED).nonzero()[:, 0]
    scale = int(fields[PACKS, 0]) / max(1, int(fields[TARGETS, 0]))
    choices = _choices_of(fields, targets) if len(fields) > FIELDS else None
    return Segments(groups, targets.tolist(), fields[TARGET][targets].tolist(), scale, choices)


def _choices_of(fields: Tensor, targets: Tensor) -> Choices | None:
    """Read the candidates; `targets`: the rows that predict a token. None if there are none."""
    tokens = fields[:, fields[ROW] > 0]
    candidates = fields[:, fields[EXAMPLE] > 0]
    if not candidates.shape[1]:
        return None
    return Choices(
        torch.searchsorted(targets, tokens[ROW] - 1).tolist(),
        tokens[TOKEN_ID].tolist(),
        tokens[CANDIDATE].tolist(),
        tokens[LATER].nonzero()[:, 0].tolist(),
        (candidates[EXAMPLE] - 1).tolist(),
        candidates[PLACE].tolist(),
        *(candidates[field].contiguous().view(torch.float64).tolist() for field in (SHARE, SCALE, OFFSET)),
    )


def build_layout(segments: Segments, device: torch.device, fused: bool | None = None) -> Layout:
    """Build the layout with its tensors on `device`; `fused`: by default, whether that is a GPU."""
    fused = device.type == "cuda" if fused is None else fused
    groups = []
    for before, spans in _by_prefix(segments) if fused else segments.groups:
        groups.append(group_of(tuple(spans), before, device))
    targets, wanted = indices(segments.targets, device), indices(segments.wanted, device)
    predicting = targets if segments.targets else torch.zeros(1, dtype=torch.int64, device=device)
    candidates = None if segments.choices is None else _candidates(segments.choices, device)
    return Layout(groups, targets, wanted, predicting, segments.scale, fused, candidates)


def _candidates(choices: Choices, device: torch.device) -> Candidates:
    return Candidates(
        indices(choices.rows, device),
        indices(choices.tokens, device),
        indices(choices.of, device),
        indices(choices.later, device),
        indices(choices.example, device),
        indices(choices.place, device),
        on(torch.tensor(choices.shares, dtype=torch.float32), device),
        max(choices.example) + 1,
        max(choices.place) + 1,
        on(torch.tensor(choices.scales, dtype=torch.float32), device),
        on(torch.tensor(choices.offsets, dtype=torch.float32), device),
    )


def _by_prefix(segments: Segments) -> list[tuple[Span | None, list[Span]]]:
    """Merge groups as long as repeats stay fewer than rows: on a GPU fewer calls matter more than fewer rows."""
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


def group_of(spans: tuple[Span, ...], before: Span | None, device: torch.device) -> SegmentGroup:
    """Build a group of segments from their [begin, end) in the pack, and that of the one they continue."""
    prefix = torch.arange(*before or (0, 0), device=device)
    longest = max(end - begin for begin, end in spans)
    begins, ends = (indices(x, device)[:, None] for x in zip(*spans, strict=True))
    rows = begins + torch.arange(longest, device=device)
    if all(end - begin == longest for begin, end in spans):
        return SegmentGroup(spans, before, rows, None, None, prefix)
    places = [i * longest + j for i, (begin, end) in enumerate(spans) for j in range(end - begin)]
    own = torch.minimum(rows, ends - 1), rows < ends, indices(places, device)
    return SegmentGroup(spans, before, *own, prefix)


def indices(values: Any, device: torch.device) -> Tensor:
    """Return an int64 tensor on `device`, without waiting for a GPU."""
    return on(torch.tensor(values, dtype=torch.int64), device)


def on(values: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the CPU to a device, without waiting for a GPU."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)
