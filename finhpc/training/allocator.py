"""Tune glibc's malloc: keep freed memory for the next step, or return it to the operating system.

A training step frees and allocates the same large buffers again. glibc returns each of them to the system, which then
has to clear every page again: that was 40 % of a low-rank GPT2-127M step on two cores.
"""

from __future__ import annotations

import ctypes
import platform

M_MMAP_THRESHOLD = -3  # malloc.h
# Variable of the environment -> name in malloc.h, value.
SETTINGS = {
    "MALLOC_MMAP_MAX_": (-4, 0),
    "MALLOC_TRIM_THRESHOLD_": (-1, 2**31 - 1),
    "MALLOC_TOP_PAD_": (-2, 256 << 20),
    "MALLOC_ARENA_MAX": (-8, 1),
}
# For a process that is about to start. A process that trains in another thread than its first needs them, because the
# thread gets an arena of its own before any call can prevent it, and glibc empties such arenas.
ENVIRONMENT = {variable: str(value) for variable, (_, value) in SETTINGS.items()}


def keep_freed_memory() -> bool:
    """Make glibc's malloc keep freed memory; False if the C library is not glibc.

    The process then stays at its peak resident size. Large blocks come from the heap instead of separate mappings,
    the heap grows in steps of 256 MB of address space, and one arena serves all threads, so that freed blocks are
    reused.
    """
    done = [_mallopt(name, value) for name, value in SETTINGS.values()]
    return all(done)


def return_freed_memory() -> bool:
    """Make glibc's malloc return blocks above 1 MB when they are freed; False if the C library is not glibc.

    By default it takes more and more of them from the heap, which work on matrices of several sizes fragments: a
    model's second moments took 20 to 40 MB more for every block.
    """
    return _mallopt(M_MMAP_THRESHOLD, 1 << 20)


def _mallopt(name: int, value: int) -> bool:
    """Whether glibc accepted a setting."""
    return platform.libc_ver()[0] == "glibc" and bool(ctypes.CDLL(None).mallopt(name, value))


def trim_heap() -> None:
    """Return the heap's free pages to the system now; glibc takes them again when needed."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
