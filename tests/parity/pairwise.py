"""Few combinations in which every pair of two axes' values occurs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

Combination = dict[str, str]
Pair = tuple[tuple[str, str], tuple[str, str]]


def pairwise(axes: Mapping[str, Sequence[str]], allowed: Callable[[Combination], bool]) -> list[Combination]:
    """Combinations of the axes' values, greedily chosen; those that `allowed` refuses are left out.

    `allowed` also takes combinations of some of the axes alone.
    """
    order = sorted(axes, key=lambda axis: -len(axes[axis]))
    open_: dict[Pair, None] = {}
    for first, second in combinations(order, 2):
        for a in axes[first]:
            for b in axes[second]:
                if allowed({first: a, second: b}):
                    open_[(first, a), (second, b)] = None
    found: list[Combination] = []
    while open_:
        chosen = dict(next(iter(open_)))
        for axis in order:
            if axis not in chosen:
                values = [value for value in axes[axis] if allowed(chosen | {axis: value})]
                chosen[axis] = max(values, key=lambda value: sum(
                    pair in open_ for pair in _pairs_with(chosen, axis, value, order)
                ))  # fmt: skip
        for pair in _all_pairs(chosen, order):
            open_.pop(pair, None)
        found.append({axis: chosen[axis] for axis in axes})
    return found


def _pairs_with(chosen: Combination, axis: str, value: str, order: list[str]) -> list[Pair]:
    return [pair for pair in _all_pairs(chosen | {axis: value}, order) if (axis, value) in pair]


def _all_pairs(chosen: Combination, order: list[str]) -> list[Pair]:
    named = [(axis, chosen[axis]) for axis in order if axis in chosen]
    return list(combinations(named, 2))
