"""Keys and values of many requests in blocks of one size, and attention over them.

A pass computes one flat row of new tokens of all requests: linear layers see no padding, and only attention knows which
token belongs to which request. Requests with as many new tokens are attended together. Blocks that lie in a row, as far
as there was room for that, are read where they are; those of several short requests are copied side by side, a part at
a time that stays in the processor's cache. Measured on Zen 5 cores, copying doubles the time of attention, and a call
for each request is cheaper from some 200 tokens on.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from finhpc.models.attention import Scores, attend

COPIED_BYTES = {"cpu": 2 << 20, "cuda": 1 << 28}  # keys and values that are copied at a time; at least one request's
VIEWED_BYTES = {"cpu": 1 << 18, "cuda": 1 << 28}  # of one layer, from which on reading them in place is worth a call


class Span(NamedTuple):
    """New tokens of a request: they follow `past` others, whose keys and values are in the blocks of `table`."""

    table: Sequence[int]
    past: int
    new: int


@dataclass
class Group:
    """Consecutive rows of requests with as many new tokens each.

    `length`: of the longest; `even`: of all. `positions`: of the queries (requests, new). `blocks`: their tables,
    padded, which are copied; `view`: first slot, and slots from one request to the next, if they are read in place;
    with neither, keys and values are those of the rows themselves. `masks`: by window, which keys each query sees.
    """

    begin: int
    requests: int
    new: int
    length: int
    even: bool
    positions: Tensor
    blocks: Tensor | None = None
    view: tuple[int, int] | None = None
    masks: dict[int | None, Tensor | None] = field(default_factory=dict)

    def sees(self, window: int | None) -> Tensor | None:
        """Return the bool mask (requests, 1, new, length); None if the causal order says it all."""
        if window is not None and window >= self.length:
            window = None
        if window not in self.masks:
            self.masks[window] = self._sees(window)
        return self.masks[window]

    def _sees(self, window: int | None) -> Tensor | None:
        own = self.blocks is None and self.view is None
        if window is None and (own or (self.new == 1 and self.even)):
            return None
        places = torch.arange(self.length, device=self.positions.device)
        queries = self.positions[:, None, :, None]
        sees = places <= queries
        return sees if window is None else sees & (places > queries - window)


class Pass(NamedTuple):
    """What a pass computes: `positions` and `slots` (places in the cache) of its tokens, and their groups.

    There may be more positions than slots: those of rows that belong to no request.
    """

    positions: Tensor
    slots: Tensor
    groups: list[Group]


class PagedCache:
    """Keys and values of `blocks` blocks of `block_size` tokens: (layers, 2, kv_heads, blocks, block_size, head size).

    Memory is taken when a block is first used, never more than `bytes`.
    """

    def __init__(self, config: Any, blocks: int, block_size: int, dtype: torch.dtype, device: torch.device) -> None:
        layers, kv_heads, head_size = shape_of(config)
        self.block_size, self.device = block_size, device
        self.data = _zeros((layers, 2, kv_heads, blocks, block_size, head_size), dtype, device)
        self.flat = self.data.view(layers, 2, kv_heads, blocks * block_size, head_size)
        self.token_bytes = 2 * kv_heads * head_size * self.data.element_size()  # of a layer
        self.current: Pass | None = None

    @property
    def bytes(self) -> int:
        return self.data.nbytes

    def clear(self, blocks: Sequence[int]) -> None:
        """Zero blocks that get a new user: what was NaN in them would be so again, although masked."""
        if blocks:
            self.data[:, :, :, torch.tensor(blocks, device=self.device)] = 0

    def begin(self, spans: Sequence[Span], more: int = 0) -> Pass:
        """Set the rows of the next pass; equal numbers of new tokens stand together, the longest first.

        `more` rows after them belong to no request.
        """
        size = self.block_size
        positions: list[int] = []
        slots: list[int] = []
        for span in spans:
            places = range(span.past, span.past + span.new)
            positions += places
            slots += [span.table[place // size] * size + place % size for place in places]
        count = len(positions)
        flat = torch.tensor([positions + [0] * more, slots + [0] * more], device=self.device)
        self.current = Pass(flat[0], flat[1, :count], self._groups(spans, flat[0]))
        return self.current

    def _groups(self, spans: Sequence[Span], positions: Tensor) -> list[Group]:
        groups, begin, row = [], 0, 0
        while begin < len(spans):
            new, fresh = spans[begin].new, spans[begin].new > 1 and not spans[begin].past
            alike = begin + 1
            while alike < len(spans) and spans[alike].new == new and (new == 1 or fresh != bool(spans[alike].past)):
                alike += 1
            end, view = (alike, None) if fresh else self._part(spans[begin:alike])
            end = end if fresh else begin + end
            some = spans[begin:end]
            lengths = [span.past + span.new for span in some]
            rows = positions[row : row + new * len(some)].view(-1, new)
            group = Group(row, len(some), new, max(lengths), len(set(lengths)) == 1, rows, view=view)
            if not fresh and view is None:
                group.blocks = self._copied(some, group.length)
            groups.append(group)
            begin, row = end, row + new * len(some)
        return groups

    def _part(self, spans: Sequence[Span]) -> tuple[int, tuple[int, int] | None]:
        """Return how many of `spans` are attended together, and from where to where if their blocks lie in rows."""
        device, length = self.device.type, spans[0].past + spans[0].new
        copied = max(1, min(len(spans), COPIED_BYTES[device] // (self.token_bytes * length)))
        count = -(-length // self.block_size)
        starts: list[int] = []
        for span in spans:
            table = span.table[: -(-(span.past + span.new) // self.block_size)]
            gap = starts[1] - starts[0] if len(starts) > 1 else 0
            in_a_row = len(table) == count and all(b - a == 1 for a, b in pairwise(table))
            if not in_a_row or (starts and (table[0] <= starts[-1] or (gap and table[0] - starts[-1] != gap))):
                break
            starts.append(table[0])
        if not starts or (len(starts) < copied and len(starts) * length * self.token_bytes < VIEWED_BYTES[device]):
            return copied, None
        gap = starts[1] - starts[0] if len(starts) > 1 else 0
        return len(starts), (starts[0] * self.block_size, gap * self.block_size)

    def _copied(self, spans: Sequence[Span], length: int) -> Tensor:
        """Return the tables, padded with a block of the request itself."""
        count = -(-length // self.block_size)
        tables = [list(span.table[:count]) for span in spans]
        padded = [table + table[:1] * (count - len(table)) for table in tables]
        return torch.tensor(padded, device=self.device).view(-1)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
        """Store keys and values of a layer, and return what the queries find: (tokens, heads, head size).

        q (tokens, heads, size), k and v (tokens, kv_heads, size) are those of the rows of `begin`.
        """
        assert self.current is not None
        flat, count, more = self.flat[layer], len(self.current.slots), len(q) - len(self.current.slots)
        if more:
            return F.pad(self.attend(layer, q[:count], k[:count], v[:count], scores), (0, 0, 0, 0, 0, more))
        stored = torch.stack((k, v)).transpose(1, 2).to(flat.dtype)  # (2, kv_heads, tokens, size)
        flat.index_copy_(2, self.current.slots, stored)
        q = q.to(flat.dtype)
        if len(self.current.groups) == 1:
            return self._attend(layer, self.current.groups[0], q, stored, scores)
        out = torch.empty_like(q)
        for group in self.current.groups:
            rows = slice(group.begin, group.begin + group.requests * group.new)
            out[rows] = self._attend(layer, group, q[rows], stored[:, :, rows], scores)
        return out

    def _attend(self, layer: int, group: Group, q: Tensor, own: Tensor, scores: Scores) -> Tensor:
        """Return what the queries of a group find; `own`: keys and values of its rows."""
        kv_heads, size = own.shape[1], own.shape[3]
        if group.view is not None:
            flat, (begin, gap) = self.flat[layer], group.view
            shape = (2, kv_heads, group.requests, group.length, size)
            strides = (*flat.stride()[:2], gap * size, size, 1)
            cached = flat.as_strided(shape, strides, flat.storage_offset() + begin * size)
        elif group.blocks is None:
            cached = own.unflatten(2, (group.requests, group.new))
        else:
            cached = self.data[layer].index_select(2, group.blocks)
            cached = cached.view(2, kv_heads, group.requests, -1, size)[:, :, :, : group.length]
        keys, values = cached.transpose(1, 2)  # each (requests, kv_heads, length, size)
        sees = group.sees(scores.window)
        if group.new == 1:  # query heads that share keys take the place of several tokens' queries
            q = q.view(group.requests, kv_heads, -1, size)
            if scores.cap is None:
                found = F.scaled_dot_product_attention(q, keys, values, sees, scale=scores.scale)
            else:
                every = torch.ones(1, group.length, dtype=torch.bool, device=q.device)
                found = attend(q, keys, values, every if sees is None else sees, Scores(scores.scale, None, scores.cap))
            return found.reshape(group.requests, -1, size)
        q = q.view(group.requests, group.new, -1, size).transpose(1, 2)
        found = attend(q, keys, values, sees, Scores(scores.scale, None, scores.cap))
        return found.transpose(1, 2).flatten(0, 1)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros; on a CPU in a mapping of their own, because malloc may clear what it has kept, page by page."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def shape_of(config: Any) -> tuple[int, int, int]:
    """Return layers, heads of keys and values, and the size of a head."""
    heads: int = config.num_attention_heads
    size: int = getattr(config, "head_dim", None) or config.hidden_size // heads
    return config.num_hidden_layers, getattr(config, "num_key_value_heads", heads), size


def dtype_of(model_dtype: torch.dtype, device: str) -> torch.dtype:
    """Return the type of keys and values: float32 on a CPU, where torch's 16-bit attention is five times slower."""
    return torch.float32 if device == "cpu" else model_dtype


def block_bytes(config: Any, block_size: int, device: str) -> int:
    """Return the bytes of a block of a model's keys and values in all layers, on a type of device."""
    layers, kv_heads, head_size = shape_of(config)
    return 2 * layers * kv_heads * head_size * block_size * dtype_of(config.dtype or torch.float32, device).itemsize


def cache_bytes(
    token_bytes: int, lengths: Sequence[int], ends: Sequence[int], longest: int, context: int, block_size: int
) -> dict[str, int]:
    """Return the bytes of keys and values of requests with so many `lengths` tokens at some moment, by layout.

    `token_bytes`: of a token in all layers. `tokens`: what they are; `paged`: in whole blocks, of which the last of a
    request is partly empty; `rows: own end`: a row each of its tokens at its end, which nobody knows before; `rows:
    longest`: of the longest that a request may become; `rows: context`: of the model's context, where no limit is
    known. What a layout takes beyond the tokens is its fragmentation (Kwon et al. 2023, section 3).
    """
    counts = {
        "tokens": sum(lengths),
        "paged": sum(-(-length // block_size) * block_size for length in lengths),
        "rows: own end": sum(ends),
        "rows: longest": len(lengths) * longest,
        "rows: context": len(lengths) * context,
    }
    return {name: count * token_bytes for name, count in counts.items()}
