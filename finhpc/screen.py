"""How far a long job is, on stderr: a bar on a terminal, else a line at most every ten seconds."""

from __future__ import annotations

import os
import re
import shlex
import sys
import time
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

SECONDS_A_LINE = 10.0
FILE_WIDTH = 200  # columns


class Progress:
    """Counts work of a known total and shows rate and time left; use as a context manager.

    `total` and `advance` count bytes where `bytes_` is set, else pieces.
    """

    def __init__(self, label: str, total: int, bytes_: bool = True) -> None:
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


def rows_table(title: str, rows: list[dict[str, Any]], stream: TextIO | None = None) -> None:
    """A table on stderr with a column for each key of the first row; nothing where there are no rows."""
    table = Table(title=title, title_justify="left")
    for name, value in rows[0].items() if rows else ():
        table.add_column(name, justify="left" if _is_words(value) else "right", overflow="fold")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    if rows:
        _console(stream).print(table)


def _console(stream: TextIO | None) -> Console:
    """As wide as the terminal; a file, which rich would take for 80 columns, gets whole lines."""
    console = Console(file=stream or sys.stderr, markup=False, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = FILE_WIDTH
    return console


def _is_words(value: Any) -> bool:
    return isinstance(value, str) and not re.fullmatch(r"[-+]?[\d.,]+( ?%)?", value)


def summary_table(title: str, rows: list[tuple[str, str]], stream: TextIO | None = None) -> None:
    """A short two-column table on stderr; paths and commands too long for it stand below, whole, to be copied.

    A value that is a path is quoted as a shell needs it.
    """
    rows = [(name, _pasted(value)) for name, value in rows]
    console = _console(stream)
    room = console.width - max((len(name) for name, _ in rows), default=0) - 7  # the table's lines and spaces
    below = [(name, value) for name, value in rows if len(value) > room and (value[:1] in "/'" or " --" in value)]
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        if (name, value) not in below:
            table.add_row(name, value)
    console.print(table)
    for name, value in below:
        console.print(f"{name}: {value}", soft_wrap=True)


def _pasted(value: str) -> str:
    return shlex.quote(value) if os.path.isabs(value) and os.path.exists(value) else value
