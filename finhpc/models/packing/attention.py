"""Attention within packed examples: a token sees its segment up to itself and the whole segment that it continues.

On a CPU there is no tokens x tokens mask: segments of similar length are multiplied together, a block of queries at a
time, with the keys that the block can see; heads that share keys and values are rows of one product. On a GPU torch's
fused kernel takes a short pack at once, with a mask, and of a longer one all segments of a prefix.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from finhpc.models.attention import QUERIES, SCORE_BYTES, Scores, attend
from finhpc.models.packing.layout import Layout, SegmentGroup, indices

AT_ONCE = 1024  # tokens of packs whose segments are attended at once: launches take longer than hidden products
ALIGNED = 16  # numbers
LONGEST = 1024  # tokens: for longer segments, stored probabilities would be most of a step's memory


class SegmentAttention(torch.autograd.Function):
    """softmax(scale Q K^T + mask) V for q (T, heads, size), k and v (T, shared heads, size) of one dtype; as q.

    A query sees only the last `window` tokens up to itself, if there is a window.

    Stores the probabilities for the backward pass or, without `keep`, recomputes them bit-identically. The gradients of
    a prefix are sums over all segments that continue it. Padding gets zeros.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: Layout,
        scale: float,
        keep: bool = True,
        window: int | None = None,
    ) -> Tensor:
        out = torch.zeros_like(q, memory_format=torch.contiguous_format)
        stored: list[Tensor] = []
        for group in _groups(layout, q):
            query, keys, values = _queries(q, group, k.shape[1]), _keys(k, group), _keys(v, group)
            result = torch.empty_like(query)
            for begin, end, seen in _blocks(group):
                p = _probabilities(query, keys, begin, end, seen, scale, window)
                part = torch.bmm(p, values[:, :seen])
                result[:, :, begin:end] = part.view(*result.shape[:2], end - begin, -1)
                if _keeps(group, keep):
                    stored.append(p)
            _put(out, result, group)
        ctx.save_for_backward(q, k, v, *stored)
        ctx.layout, ctx.scale, ctx.keep, ctx.window = layout, scale, keep, window
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        q, k, v, *stored = ctx.saved_tensors
        d_q, d_k, d_v = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        probabilities = iter(stored)
        for group in _groups(ctx.layout, q):
            query, keys, values = _queries(q, group, k.shape[1]), _keys(k, group), _keys(v, group)
            grad = _queries(gradients[0], group, k.shape[1])
            if group.own is not None:
                shape = (len(group.rows), 1, 1, group.rows.shape[1], 1)
                grad.view(len(group.rows), -1, *grad.shape[1:]).mul_(group.own.view(shape))
            d_query, d_keys, d_values = torch.empty_like(query), torch.zeros_like(keys), torch.zeros_like(values)
            for begin, end, seen in _blocks(group):
                p = (
                    next(probabilities)
                    if _keeps(group, ctx.keep)
                    else _probabilities(query, keys, begin, end, seen, ctx.scale, ctx.window)
                )
                rows = grad[:, :, begin:end].reshape(len(grad), -1, grad.shape[-1])
                d_values[:, :seen] += torch.bmm(p.transpose(1, 2), rows)
                d_p = torch.bmm(rows, values[:, :seen].transpose(1, 2))
                d_scores = torch._softmax_backward_data(d_p, p, -1, p.dtype).mul_(ctx.scale)
                part = torch.bmm(d_scores, keys[:, :seen])
                d_query[:, :, begin:end] = part.view(*query.shape[:2], end - begin, -1)
                d_keys[:, :seen] += torch.bmm(
                    d_scores.transpose(1, 2), query[:, :, begin:end].reshape(len(query), -1, query.shape[-1])
                )
            _put(d_q, d_query, group)
            _add(d_k, d_keys, group)
            _add(d_v, d_values, group)
        return d_q, d_k, d_v, None, None, None, None


def _groups(layout: Layout, q: Tensor) -> Iterator[SegmentGroup]:
    """Yield the groups, cut so that the scores of a block of queries fit into SCORE_BYTES, at least a segment each."""
    for index, group in enumerate(layout.groups):
        longest = group.rows.shape[1]
        seen = longest + len(group.prefix)
        step = max(1, SCORE_BYTES // (q.shape[1] * min(QUERIES, longest) * seen * q.element_size()))
        yield from layout.cut(index, step)


def _keeps(group: SegmentGroup, keep: bool) -> bool:
    return keep and group.rows.shape[1] <= LONGEST


def _blocks(group: SegmentGroup) -> Iterator[tuple[int, int, int]]:
    """Yield (first query, end, number of keys that they see, the prefix's first)."""
    longest = group.rows.shape[1]
    for begin in range(0, longest, QUERIES):
        end = min(longest, begin + QUERIES)
        yield begin, end, len(group.prefix) + end


def _queries(x: Tensor, group: SegmentGroup, shared: int) -> Tensor:
    """(T, heads, size) -> (segments * shared heads, heads that share, longest, size)."""
    segments, longest = group.rows.shape
    rows = x[group.rows.reshape(-1)].view(segments, longest, shared, -1, x.shape[-1])
    return rows.permute(0, 2, 3, 1, 4).reshape(segments * shared, -1, longest, x.shape[-1])


def _keys(x: Tensor, group: SegmentGroup) -> Tensor:
    """(T, shared heads, size) -> (segments * shared heads, prefix + longest, size)."""
    segments = len(group.rows)
    rows = torch.cat((group.prefix.expand(segments, -1), group.rows), 1)
    keys = x[rows.reshape(-1)].view(segments, rows.shape[1], *x.shape[1:])
    return keys.transpose(1, 2).reshape(segments * x.shape[1], rows.shape[1], x.shape[-1])


def _put(into: Tensor, x: Tensor, group: SegmentGroup) -> None:
    """Write the rows that `_queries` gathered back to their places."""
    segments, longest = group.rows.shape
    shared = len(x) // segments
    rows = x.view(segments, shared, -1, longest, x.shape[-1]).permute(0, 3, 1, 2, 4).reshape(segments, longest, -1)
    flat = into.view(len(into), -1)
    places, values = _own(group, rows)
    flat[places] = values


def _add(into: Tensor, x: Tensor, group: SegmentGroup) -> None:
    """Add gradients of the keys that `_keys` gathered; a prefix gets the sum over its segments."""
    segments, longest = group.rows.shape
    before = len(group.prefix)
    rows = x.view(segments, -1, before + longest, x.shape[-1]).transpose(1, 2)
    if before:
        into[group.prefix] += rows[:, :before].sum(0)
    places, values = _own(group, rows[:, before:].reshape(segments, longest, -1))
    into[places] += values.view(-1, *into.shape[1:])


def _own(group: SegmentGroup, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the group's rows of the pack, each once, and their values in `x`: (rows, width)."""
    flat, rows = x.reshape(-1, x.shape[-1]), group.rows.reshape(-1)
    return (rows, flat) if group.places is None else (rows[group.places], flat[group.places])


def _probabilities(
    query: Tensor, keys: Tensor, begin: int, end: int, seen: int, scale: float, window: int | None
) -> Tensor:
    """(segments * shared heads, sharing * (end - begin), seen)."""
    count = end - begin
    rows = query[:, :, begin:end].reshape(len(query), -1, query.shape[-1])
    scores = torch.bmm(rows, keys[:, :seen].transpose(1, 2)).mul_(scale)
    hidden = torch.ones(count, count, dtype=torch.bool, device=query.device).triu_(1)
    own = scores.view(len(query), -1, count, seen)[..., seen - count :]
    own.masked_fill_(hidden, float("-inf"))
    if window is not None and window < seen:
        far = torch.ones(count, seen, dtype=torch.bool, device=query.device).tril_(seen - count - window)
        scores.view(len(query), -1, count, seen).masked_fill_(far, float("-inf"))
    return torch.softmax(scores, -1)


def attend_segments(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scores: Scores, keep: bool) -> Tensor:
    """(T, heads, size) from the same and k, v (T, shared heads, size); see `SegmentAttention`.

    torch's fused kernel stores no probabilities, whatever `keep` is.
    """
    longest = max((group.rows.shape[1] + len(group.prefix) for group in layout.groups), default=0)
    window = scores.window if scores.window is not None and scores.window < longest else None
    if not layout.groups or (scores.cap is None and not layout.fused):
        return SegmentAttention.apply(q, k, v, layout, scores.scale, keep, window)  # type: ignore[no-untyped-call, no-any-return]
    if scores.cap is None and window is None and len(q) <= AT_ONCE:
        return _at_once(q, k, v, layout, scores.scale)
    return _by_group(q, k, v, layout, scores, keep)


def _at_once(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> Tensor:
    """Like `attend_segments`, all segments in one call; the same mask serves all layers."""
    key = "visible", q.dtype
    if key not in layout.cache:
        layout.cache[key] = _visible(layout, len(q), q)
    bias, own = layout.cache[key]
    if (sharing := q.shape[1] // k.shape[1]) > 1:
        k, v = k.repeat_interleave(sharing, 1), v.repeat_interleave(sharing, 1)
    query, keys, values = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(query, keys, values, bias, scale=scale).squeeze(0).transpose(0, 1)
    return out if own is None else out * own


def _visible(layout: Layout, size: int, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return which keys each row sees, as 0 or -inf (1, 1, size, size), and which rows are no padding, if some are."""
    numbers, befores = np.zeros(size, np.int64), np.zeros(size, np.int64)
    spans = [span for group in layout.groups for span in group.spans]
    for number, (begin, end) in enumerate(spans, 1):
        numbers[begin:end] = number
    for group in layout.groups:
        for begin, end in group.spans if group.before else ():
            befores[begin:end] = numbers[group.before[0]]  # type: ignore[index]
    number, before = indices(np.stack((numbers, befores)), like.device)
    row = torch.arange(size, device=like.device)
    sees = (number[:, None] == number) & (row[:, None] >= row)
    sees |= (before[:, None] == number) & (before[:, None] > 0)
    # Kernels read rows whose beginnings are aligned, or copy the mask in every layer.
    bias = like.new_zeros(size, -(-size // ALIGNED) * ALIGNED)[:, :size].masked_fill_(~sees, float("-inf"))
    own = None if numbers.all() else (number > 0).to(like.dtype)[:, None, None]
    return bias[None, None], own


def _by_group(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scores: Scores, keep: bool) -> Tensor:
    """Like `attend_segments`; shorter segments repeat their last row, which nothing else sees or copies back."""
    out = torch.zeros_like(q)
    run = partial(checkpoint, attend, use_reentrant=False) if scores.cap is not None and not keep else attend
    for index, group in enumerate(layout.groups):
        query = q.index_select(0, group.rows.reshape(-1)).view(*group.rows.shape, *q.shape[1:]).transpose(1, 2)
        keys, values = (_seen(x, group, q.shape[1]) for x in (k, v))
        if (key := ("mask", index)) not in layout.cache:
            layout.cache[key] = _mask(group)
        attended = run(query, keys, values, layout.cache[key], scores)
        places, rows = _own(group, attended.transpose(1, 2).reshape(*group.rows.shape, -1))
        out = out.index_copy(0, places, rows.view(-1, *q.shape[1:]))
    return out


def _seen(x: Tensor, group: SegmentGroup, heads: int) -> Tensor:
    """(T, shared heads, size) -> (segments, heads, prefix + longest, size)."""
    rows = x.index_select(0, group.rows.reshape(-1)).view(*group.rows.shape, *x.shape[1:])
    if len(group.prefix):
        prefix = x.index_select(0, group.prefix).expand(len(rows), -1, -1, -1)
        rows = torch.cat((prefix, rows), 1)
    sharing = heads // x.shape[1]
    return (rows.repeat_interleave(sharing, 2) if sharing > 1 else rows).transpose(1, 2)


def _mask(group: SegmentGroup) -> Tensor | None:
    """Return which keys each query of the group sees: bool (longest, prefix + longest), None for those up to itself."""
    longest, before = group.rows.shape[1], len(group.prefix)
    if not before:
        return None
    return torch.ones(longest, before + longest, dtype=torch.bool, device=group.rows.device).tril(before)
