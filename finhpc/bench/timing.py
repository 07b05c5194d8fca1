"""Timing on one device: ways to do the same work, in turn, so that a drifting machine affects all equally."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

from finhpc.errors import ConfigError
from finhpc.settings.training import Resources
from finhpc.training.allocator import keep_freed_memory


def device_of(resources: Resources) -> torch.device:
    """The requested device; sets this process up for it. Raises `ConfigError` if there is no GPU."""
    cuda = torch.cuda.is_available()
    if resources.device == "cuda" and not cuda:
        raise ConfigError("resources.device=cuda, but torch sees no GPU; use resources.device=cpu.")
    torch.set_num_threads(resources.threads)
    device = torch.device("cuda" if cuda and resources.device != "cpu" else "cpu")
    if device.type == "cpu":
        keep_freed_memory()  # before any model, so that every way has it
    return device


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that `work` takes on `device`."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


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
