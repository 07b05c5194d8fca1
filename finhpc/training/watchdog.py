"""A worker that hangs ends itself and writes its stacks.

A worker waits for its neighbors in every micro-batch. If one of them hangs, all do, as long as their sockets stay
open: forever. So each worker watches its own progress. After `train.hang_timeout_s` without any, it writes the stacks
of all its threads to `RUN/stacks/` and exits at once; Ray Train then ends the others and restarts all of them from the
newest checkpoint. The command sees the file and reports it.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

# The start (reading a checkpoint, compiling, filling caches, the first step) may take this many times longer. The
# process group's timeout is the same, so that it never ends a wait before the watchdog does.
START_FACTOR = 3
EXIT_CODE = 75
FOLDER = "stacks"


class Watchdog:
    """`with Watchdog(...):` ends the process if `progress()` stays the same for too long.

    `progress` returns anything comparable and must not block. A `timeout_s` of 0 turns the watchdog off. Until
    `settle` is called, the limit is `START_FACTOR` times longer.
    """

    def __init__(self, run: Path, world_rank: int, timeout_s: float, progress: Callable[[], object]) -> None:
        self.folder, self.world_rank, self.timeout_s = run / FOLDER, world_rank, timeout_s
        self.progress = progress
        self.limit_s = START_FACTOR * timeout_s
        self._poll_s = min(5.0, timeout_s / 20)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self.timeout_s:
            self.folder.mkdir(parents=True, exist_ok=True)
            for old in self.folder.glob(f"rank-{self.world_rank}-*.txt"):
                if old.stat().st_size == 0:  # from a worker that was killed while it made progress
                    old.unlink(missing_ok=True)
            self.path = self.folder / f"rank-{self.world_rank}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
            self._file = open(self.path, "w", encoding="utf-8")  # now, because Python may hang later
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.timeout_s:
            self._stop.set()
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()
            self._file.close()
            self.path.unlink(missing_ok=True)

    def settle(self) -> None:
        """End the start: from here on the limit is `timeout_s`."""
        self.limit_s = self.timeout_s

    def _watch(self) -> None:
        # Time is counted in polls, not read from the clock, so that a process that was stopped, or a machine that
        # slept, gets its full time again.
        idle_s, before = 0.0, self.progress()
        while True:
            # If native code holds Python's lock, this thread hangs too, but faulthandler's own does not.
            faulthandler.dump_traceback_later(self.limit_s + 4 * self._poll_s, exit=True, file=self._file)
            if self._stop.wait(self._poll_s):
                return
            now = self.progress()
            idle_s = idle_s + self._poll_s if now == before else 0.0
            before = now
            if idle_s >= self.limit_s:
                self._end(idle_s)

    def _end(self, idle_s: float) -> None:
        text = f"worker {self.world_rank} made no progress for {idle_s:.0f} s (train.hang_timeout_s={self.timeout_s:g})"
        try:
            self._file.write(f"{text}; the stacks of its threads:\n")
            self._file.flush()
            faulthandler.dump_traceback(self._file, all_threads=True)
            self._file.flush()
            os.fsync(self._file.fileno())
            print(f"{text}; its stacks are in {self.path}", file=sys.stderr, flush=True)
        finally:
            os._exit(EXIT_CODE)
