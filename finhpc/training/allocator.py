"""What becomes of freed memory: kept for the next step, or given back.

A training step frees and takes the same large buffers again. glibc hands each of them back to the
system, which has to clear every page anew: that was 40 % of a low-rank GPT2-127M step on two cores.
"""

from __future__ import annotations

import ctypes
import platform

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -3, -4, -8  # malloc.h
SETTINGS = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 256 << 20, M_ARENA_MAX: 1}

# The same for a process that is yet to start. One that trains in a thread of its own needs it so: the thread has
# an arena before any call can forbid it, and of such arenas glibc gives everything back.
ENVIRONMENT = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "MALLOC_TOP_PAD_": str(256 << 20),
    "MALLOC_ARENA_MAX": "1",
}


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to keep what is freed; False where the C library is another one.

    The process then stays at its peak resident size. Large blocks come from the heap instead of
    mappings of their own; the heap grows in steps of 256 MB of address space, and one arena serves
    all threads, so that freed blocks are found again.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    done = [mallopt(name, value) for name, value in SETTINGS.items()]  # 1 where taken
    return all(done)


def give_back_freed_memory() -> bool:
    """Tell glibc's malloc to return blocks above 1 MB as soon as they are freed; False where it is another one.

    By default it takes more and more of them from the heap, where work on matrices of several sizes
    leaves holes: a model's second moments took 20 to 40 MB more for every block.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    return bool(ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20))


def trim_heap() -> None:
    """Return the heap's free pages to the system now, where glibc keeps them; they are taken again when needed."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
