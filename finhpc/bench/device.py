"""The device of a measurement, and the time of work on it."""

from __future__ import annotations

import time
from collections.abc import Callable

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
