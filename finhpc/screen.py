"""How far a long job is, on stderr: a bar on a terminal, else a line at most every ten seconds."""

from __future__ import annotations

import sys
import time
from types import TracebackType

SECONDS_A_LINE = 10.0


class Progress:
    """Counts work of a known total and shows rate and time left; use as a context manager.

    `total` and `advance` count bytes where `bytes_` is set, else pieces.
    """

    def __init__(self, label: str, total: int, bytes_: bool = True) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self.label, self.total, self.done = label, max(total, 1), 0
        self.scale, self.unit = (1e6, "MB") if bytes_ else (1.0, "pieces")
        self.began = self.said = time.monotonic()
        self.bar: Bar | None = None
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[rate]}"))
            self.bar = Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True))
            self.task = self.bar.add_task(label, total=self.total, rate="")

    def __enter__(self) -> Progress:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar:
            self.bar.stop()

    def advance(self, amount: int) -> None:
        """Count `amount` more as done."""
        self.done += amount
        now = time.monotonic()
        rate = self.done / max(now - self.began, 1e-9)
        if self.bar:
            self.bar.update(self.task, completed=self.done, rate=f"{rate / self.scale:.1f} {self.unit}/s")
        elif now - self.said >= SECONDS_A_LINE:
            self.said = now
            left = (self.total - self.done) / rate if rate else 0.0
            print(
                f"{self.label}: {self.done / self.total:.0%} of {self.total / self.scale:.0f} {self.unit}, "
                f"{rate / self.scale:.1f} {self.unit}/s, {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )
