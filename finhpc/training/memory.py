"""The peak of a worker's memory, each kind under its own name."""

from __future__ import annotations

import gc
import resource
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from finhpc.training.allocator import trim_heap

T = TypeVar("T")
STATUS = Path("/proc/self/status")


def live_tensor_bytes() -> int:
    """Bytes of all CPU tensors this process holds, a storage counted once."""
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            if thing.is_leaf and thing.grad is not None:
                grad = thing.grad.untyped_storage()
                storages[grad.data_ptr()] = grad.nbytes()
    return sum(storages.values())


def counted_peak(work: Callable[[], T]) -> tuple[T, int]:
    """Run `work` and count the peak of live CPU tensor bytes from its allocations and frees.

    Exact for tensors of torch's CPU allocator; costs the profiler's overhead, so use it for one step.
    """
    before = live_tensor_bytes()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = work()
    level = peak = before
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.device_type() == DeviceType.CPU:
            level += event.nbytes()
            peak = max(peak, level)
    return result, peak


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: of a GPU, of torch's CPU allocator, of Python or of the system."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    words = ("can't allocate memory", "Cannot allocate memory", "not enough memory", "CUDA out of memory")
    return isinstance(error, RuntimeError | OSError) and any(word in str(error) for word in words)


def forget_peaks(device: torch.device) -> None:
    """Count peaks from here on: what an earlier run of a warm process left is freed first, and does not count."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    trim_heap()
    with suppress(OSError):  # no Linux, or no right to: the peak since the process started stays
        Path("/proc/self/clear_refs").write_text("5")


def peak_resident_bytes() -> int:
    """Peak resident bytes of this process (the operating system's count) since it started, or `forget_peaks`."""
    if STATUS.exists():
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
