"""Paired measurements: ways to do the same work, in turn, so that a drifting machine affects all equally."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping


def in_turn(ways: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Way -> what it returns (seconds or another figure) in each of `repeats` rounds A B C, A B C, ...

    Every second round runs backwards, so that no way always follows the same other one.
    """
    values: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(repeats):
        for name in list(ways) if round_ % 2 == 0 else list(ways)[::-1]:
            values[name].append(ways[name]())
    return values


def median_ratio(over: list[float], under: list[float]) -> float:
    """The median of over/under, pair by pair."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def spread(values: list[float]) -> float:
    """(largest - smallest) / median: how noisy the machine was."""
    return (max(values) - min(values)) / statistics.median(values)
