"""Tune glibc's malloc: keep freed memory for the next step, or return it to the operating system.

A training step frees and allocates the same large buffers again. glibc returns each of them to the system, which then
has to clear every page again: that was 40 % of a low-rank GPT2-127M step on two cores.
"""

from __future__ import annotations

import ctypes
import platform

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -3, -4, -8  # malloc.h
SETTINGS = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 256 << 20, M_ARENA_MAX: 1}

# The same settings for a process that is about to start. A process that trains in another thread than its first needs
# them, because the thread gets an arena of its own before any call can prevent it, and glibc empties such arenas.
ENVIRONMENT = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "MALLOC_TOP_PAD_": str(256 << 20),
    "MALLOC_ARENA_MAX": "1",
}


def keep_freed_memory() -> bool:
    """Make glibc's malloc keep freed memory; False if the C library is not glibc.

    The process then stays at its peak resident size. Large blocks come from the heap instead of separate mappings,
    the heap grows in steps of 256 MB of address space, and one arena serves all threads, so that freed blocks are
    reused.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    done = [mallopt(name, value) for name, value in SETTINGS.items()]  # 1 if accepted
    return all(done)


def return_freed_memory() -> bool:
    """Make glibc's malloc return blocks above 1 MB when they are freed; False if the C library is not glibc.

    By default it takes more and more of them from the heap, which work on matrices of several sizes fragments: a
    model's second moments took 20 to 40 MB more for every block.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    return bool(ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20))


def trim_heap() -> None:
    """Return the heap's free pages to the system now; glibc takes them again when needed."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
