"""Show training on stderr: a bar on a terminal, plain lines elsewhere.

It reads the run's journals in a thread, so it can neither slow nor stop a step.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from finhpc.training.journal import DRIVER_FILE, WORKER_FILE, Record, read

POLL_S = 0.5
FIRST_STEPS = 4  # before them the time left is not estimated: the first steps are slower


class Progress:
    """`with Progress(total_steps, folder):` shows the records that are written into the folder meanwhile.

    `eval_every`: the line of such a step, and of the last one, waits for the evaluation's loss.
    """

    def __init__(
        self,
        total_steps: int,
        folder: str | Path,
        stream: TextIO | None = None,
        line_every_s: float = 5.0,
        checkpoint_line_every_s: float = 10.0,
        eval_every: int = 0,
    ) -> None:
        self.total_steps, self.eval_every = total_steps, eval_every
        self._line_waits = False  # for the evaluation of the newest step
        self._console = Console(file=stream or sys.stderr, soft_wrap=True)
        self._line_every_s = line_every_s
        self._last_line = -math.inf
        self._checkpoint_line_every_s = checkpoint_line_every_s
        self._last_checkpoint_line = -math.inf
        self._checkpoint: Record | None = None  # the newest, until a line is printed about it
        self._train: Record = {}
        self._eval: Record = {}
        self._pace: deque[tuple[float, int]] = deque(maxlen=20)  # (time, step) of the newest steps
        # Records of earlier attempts were shown then.
        self._offsets = {path: _size(path) for path in (Path(folder) / WORKER_FILE, Path(folder) / DRIVER_FILE)}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._bar = self._make_bar() if self._console.is_terminal else None

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        self._thread = threading.Thread(target=self._follow, name="finhpc-progress", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join()
        self._poll()
        with self._lock:
            self._print_waiting_line()
            self._print_checkpoint(at_once=True)
        if self._bar:
            self._bar.stop()

    def show(self, records: Iterable[Record]) -> None:
        with self._lock:
            for record in records:
                self._show(record)

    def _show(self, record: Record) -> None:
        kind = record["kind"]
        if kind == "message":
            self._print(str(record["text"]))
        elif kind == "train":
            self._print_waiting_line()  # there was no evaluation, as no data are held out
            self._train = record
            self._pace.append((record["time"], record["step"]))
            if self._bar:
                self._bar.update(self._task, completed=record["step"], figures=self._figures())
            elif time.monotonic() - self._last_line >= self._line_every_s:
                step = record["step"]
                if step == self.total_steps or (self.eval_every and step % self.eval_every == 0):
                    self._line_waits = True
                else:
                    self._print_line()
        elif kind == "eval":
            self._eval = record
            if self._bar:
                self._bar.update(self._task, figures=self._figures())
            else:
                self._train = {**self._train, "step": record["step"]}
                self._print_line()
        elif kind == "checkpoint":
            self._checkpoint = record
            self._print_checkpoint(at_once=self._bar is not None)

    def _print_waiting_line(self) -> None:
        if self._line_waits:
            self._print_line()

    def _print_line(self) -> None:
        self._last_line, self._line_waits = time.monotonic(), False
        self._print(f"step {self._train['step']}/{self.total_steps}  {self._figures()}")

    def _print_checkpoint(self, at_once: bool = False) -> None:
        """Print a line about the newest checkpoint, unless one was printed a moment ago.

        A run that saves every few steps would flood a log; a skipped line follows later, or at the end.
        """
        now = time.monotonic()
        due = at_once or now - self._last_checkpoint_line >= self._checkpoint_line_every_s
        if self._checkpoint is not None and due:
            self._print(f"checkpoint of step {self._checkpoint['step']}: {self._checkpoint.get('path', '')}")
            self._last_checkpoint_line, self._checkpoint = now, None

    def _figures(self) -> str:
        record, parts = self._train, []
        if record.get("train_loss") is not None:
            parts.append(f"loss {record['train_loss']:.3f}")
        if self._eval.get("val_loss") is not None:
            when = "" if self._eval["step"] == record.get("step") else f" (step {self._eval['step']})"
            parts.append(f"val {self._eval['val_loss']:.3f}{when}")
        if record.get("lr") is not None:
            parts.append(f"lr {record['lr']:.1e}")
        if record.get("tokens_per_s") is not None:
            parts.append(f"{record['tokens_per_s']:,.0f} tokens/s")
        if (left := self._seconds_left()) is not None:
            parts.append(f"{timedelta(seconds=round(left))} left")
        return "  ".join(parts)

    def _seconds_left(self) -> float | None:
        if len(self._pace) < FIRST_STEPS or self._pace[-1][1] <= self._pace[0][1]:
            return None  # too early, or a resumed run went back
        (start, first), (end, last) = self._pace[0], self._pace[-1]
        return max(0.0, (end - start) / (last - first) * (self.total_steps - last))

    def _make_bar(self) -> Bar:
        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[figures]}"))
        bar = Bar(*columns, console=self._console)
        self._task = bar.add_task("training", total=self.total_steps, figures="")
        return bar

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)

    def _follow(self) -> None:
        while not self._stop.wait(POLL_S):
            self._poll()

    def _poll(self) -> None:
        for path, offset in self._offsets.items():
            records, self._offsets[path] = read(path, offset)
            self.show(records)
        with self._lock:
            self._print_checkpoint()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
