"""The sampled memory of a process and all its descendants."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType

import psutil

SECONDS = 0.2
HOW = f"sum over the process tree (proportional set size, PSS), sampled each {SECONDS} s"


class PeakMemory:
    """Samples the bytes of a process tree from another thread while the `with` block runs."""

    def __init__(self, pid: int) -> None:
        self.root = psutil.Process(pid)
        self.first = self.peak = tree_bytes(self.root)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(SECONDS):
            self.peak = max(self.peak, tree_bytes(self.root))


def tree_bytes(root: psutil.Process) -> int:
    """PSS of a process and its descendants: a page shared by n processes counts 1/n in each."""
    try:
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    return sum(_pss(process.pid) for process in processes)


def _pss(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except (FileNotFoundError, ProcessLookupError, PermissionError):  # it has ended
        return 0
    return 1024 * next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)
