"""One micro-batch as one pack: its examples next to each other, with shared prefixes only once.

The layout is defined in `finhpc.models.packing.layout`. A prefix never reaches the token that predicts the first
answer token, so it has no target, and every loss belongs to one example. Tokens after the last one that predicts
anything are left out: with causal attention no other token reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from finhpc.data.examples.examples import Arrays
from finhpc.errors import ConfigError
from finhpc.models.packing.layout import FIELDS, IGNORED, PACKS, POSITION, PREFIX, SEGMENT, TARGET, TARGETS, TOKEN

SHORTEST_PREFIX = 8  # tokens that are worth another segment
Ints = npt.NDArray[np.int64]


class Piece(NamedTuple):
    """An example for the model: its tokens, the target of each (or IGNORED), and the first token that has one."""

    tokens: Ints
    target: Ints
    first: int


class Group(NamedTuple):
    """Indices of examples that share their first `prefix` tokens (0: none)."""

    members: tuple[int, ...]
    prefix: int


def piece(arrays: Arrays, index: int) -> Piece:
    """Return example `index` without the tokens after its last predicting one."""
    tokens, answer = arrays.example(index)
    predicting = np.flatnonzero(answer[1:])
    last = int(predicting[-1]) + 1
    target = np.where(answer[1 : last + 1], tokens[1 : last + 1], IGNORED).astype(np.int64)
    return Piece(tokens[:last].astype(np.int64), target, int(predicting[0]))


def groups(pieces: Sequence[Piece], share_prefix: bool = True) -> list[Group]:
    """Group examples by common prefix so that as many tokens as possible are saved, in the order of their tokens."""
    n = len(pieces)
    if not share_prefix or n < 2:
        return [Group((i,), 0) for i in range(n)]
    heads = [one.tokens[: one.first] for one in pieces]
    order = sorted(range(n), key=lambda i: (heads[i].tolist(), len(pieces[i].tokens), i))
    common = np.array([_common(heads[a], heads[b]) for a, b in pairwise(order)])
    places = np.arange(n)
    saved, start = np.zeros(n + 1, np.int64), places.tolist()  # best of the first k; where its last run begins
    start.append(n)
    shared = np.empty(n - 1, np.int64)  # by the place j at which a run begins: what its members have in common
    least = 0  # place before which runs have too little in common
    for k in range(1, n + 1):
        saved[k], start[k] = saved[k - 1], k - 1
        if k < 2:
            continue
        shared[k - 2] = common[k - 2]
        np.minimum(shared[least : k - 1], common[k - 2], out=shared[least : k - 1])
        least += int(np.searchsorted(shared[least : k - 1], SHORTEST_PREFIX))  # it rises from place to place
        gains = saved[least : k - 1] + (k - 1 - places[least : k - 1]) * shared[least : k - 1]
        if len(gains) and gains.max() > saved[k]:
            saved[k], start[k] = gains.max(), k - 2 - int(gains[::-1].argmax())  # of equal ones the shortest run
    grouping: list[Group] = []
    k = n
    while k:
        j = start[k]
        members = tuple(order[j:k])
        grouping.append(Group(members, int(common[j : k - 1].min()) if k - j > 1 else 0))
        k = j
    return grouping[::-1]


def _common(a: Ints, b: Ints) -> int:
    shorter = min(len(a), len(b))
    other = np.flatnonzero(a[:shorter] != b[:shorter])
    return int(other[0]) if len(other) else shorter


def size(pieces: Sequence[Piece], grouping: Sequence[Group]) -> int:
    """Return the number of tokens that a pack computes."""
    return sum(len(one.tokens) for one in pieces) - sum((len(group.members) - 1) * group.prefix for group in grouping)


def pack(
    pieces: Sequence[Piece],
    grouping: Sequence[Group],
    targets: int,
    packs: int,
    multiple: int = 1,
    length: int | None = None,
) -> Ints:
    """Return int64 (1, FIELDS, T); T is the number of tokens, rounded up to `multiple`, or `length` if it is given.

    `targets`, `packs`: of the whole step or evaluation. Without examples it is padding only. Raises `ConfigError` if
    `length` is too short.
    """
    needed = size(pieces, grouping)
    total = max(-(-needed // multiple), 1) * multiple if length is None else length
    if total < needed:
        raise ConfigError(f"a micro-batch of {needed:,} tokens does not fit packs of {total:,}; use smaller ones.")
    array = np.zeros((1, FIELDS, total), np.int64)
    array[0, TARGET] = IGNORED
    array[0, TARGETS], array[0, PACKS] = targets, packs
    at, segment = 0, 0

    def lay(tokens: Ints, position: int, target: Ints, before: int) -> None:
        nonlocal at, segment
        segment += 1
        part = slice(at, at + len(tokens))
        array[0, TOKEN, part], array[0, TARGET, part] = tokens, target
        array[0, POSITION, part] = np.arange(position, position + len(tokens))
        array[0, SEGMENT, part], array[0, PREFIX, part] = segment, before
        at += len(tokens)

    for group in grouping:
        before = 0
        if group.prefix:
            first = pieces[group.members[0]]
            lay(first.tokens[: group.prefix], 0, first.target[: group.prefix], 0)
            before = segment
        for member in group.members:
            one = pieces[member]
            lay(one.tokens[group.prefix :], group.prefix, one.target[group.prefix :], before)
    return array
