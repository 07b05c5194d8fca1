"""Paired measurements: two ways to do the same work, in turn, so that a drifting machine hurts both alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping


def in_turn(ways: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """What each way measures (seconds or another figure), `repeats` rounds of A B C, A B C, ...

    Every second round runs backwards, so that no way always comes after the same other.
    """
    found: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(repeats):
        for name in list(ways) if round_ % 2 == 0 else list(ways)[::-1]:
            found[name].append(ways[name]())
    return found


def median_ratio(over: list[float], under: list[float]) -> float:
    """The median of over/under, pair by pair."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def spread(values: list[float]) -> float:
    """(largest - smallest) over the median: how noisy the machine was."""
    return (max(values) - min(values)) / statistics.median(values)
