"""The peak memory of a worker: counted tensor bytes, and resident bytes."""

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
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.profiler import ProfilerActivity, profile

from finhpc.models.constant import PACKED
from finhpc.training.allocator import trim_heap

T = TypeVar("T")
STATUS = Path("/proc/self/status")


def live_tensor_bytes() -> int:
    """The bytes of all CPU tensors of this process; each storage counts once."""
    storages = {}
    for thing in gc.get_objects():
        if not issubclass(type(thing), torch.Tensor) or _has_no_memory(thing):
            continue
        if thing.layout == PACKED:  # without a storage that torch knows
            storages[id(thing)] = thing.nbytes
        elif thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            if thing.is_leaf and thing.grad is not None:
                grad = thing.grad.untyped_storage()
                storages[grad.data_ptr()] = grad.nbytes()
    return sum(storages.values())


def _has_no_memory(tensor: torch.Tensor) -> bool:
    """Whether a tensor is one of those with which torch.compile or a plan traces code."""
    traced = issubclass(type(tensor), FakeTensor | FunctionalTensor)
    return traced or torch._is_functional_tensor(tensor)  # type: ignore[no-any-return]


def counted_peak(work: Callable[[], T]) -> tuple[T, int]:
    """Run `work`; return its result and the peak of live CPU tensor bytes, counted from allocations and frees.

    The count is exact for torch's CPU allocator. It has the profiler's overhead, so use it for one step.
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


def reset_peaks(device: torch.device) -> None:
    """Start counting peaks from here; the memory of an earlier run in this process is freed first."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    trim_heap()
    with suppress(OSError):  # not Linux, or not permitted: the peak stays that since the process started
        Path("/proc/self/clear_refs").write_text("5")


def peak_resident_bytes() -> int:
    """The peak resident bytes of this process, by the operating system, since it started or `reset_peaks`."""
    if STATUS.exists():
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
