"""What users see on stderr: lines, tables that fit the screen, and the progress of long work."""

from __future__ import annotations

import logging
import os
import re
import shlex
import sys
import time
from datetime import timedelta
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table

log = logging.getLogger(__name__)

LINE_EVERY_S = 10.0
FIRST_ADVANCES, FIRST_SHARE = 5, 0.01  # before them the time left is not estimated
FILE_WIDTH = 100  # columns of a table that goes to a file
MOST_KEYS = 3  # columns that tell the rows of a table apart
NUMBER = re.compile(r"([-+]?[\d.,]+( ?%)?|-)?")  # or none


class Progress:
    """A bar with rate and time left on a terminal; elsewhere a line every ten seconds. Use it as a context manager.

    `total` and `advance` count bytes, or what `unit` names in the plural.
    """

    def __init__(self, label: str, total: int, unit: str | None = None) -> None:
        self.label, self.total, self.done, self.advances = label, max(total, 1), 0, 0
        self.scale, self.unit = (1.0, unit) if unit else (1e6, "MB")
        self.began = self.last_line = time.monotonic()
        self.bar: Bar | None = None
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[pace]}"))
            self.bar = Bar(*columns, console=Console(stderr=True))
            self.task = self.bar.add_task(label, total=self.total, pace="")

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
        self.done, self.advances = self.done + amount, self.advances + 1
        now = time.monotonic()
        rate, share = self.done / max(now - self.began, 1e-9), self.done / self.total
        pace = f"{rate / self.scale:.1f} {self.unit}/s"
        # Tasks run side by side and end one by one: the first to end count for all that run.
        if self.advances >= FIRST_ADVANCES and share >= FIRST_SHARE:
            pace += f", {timedelta(seconds=round((self.total - self.done) / rate))} left"
        if self.bar:
            self.bar.update(self.task, completed=self.done, pace=pace)
        elif now - self.last_line >= LINE_EVERY_S:
            self.last_line = now
            log.info(f"{self.label}: {share:.0%} of {self.total / self.scale:.0f} {self.unit}, {pace}")


def counted(number: int, noun: str) -> str:
    """A number with its noun, such as "1 file" and "1,200 files"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Seconds below a minute, such as "12 s" or "0.03 s"; else hours, minutes and seconds, such as "1:02:03"."""
    return f"{seconds:.2g} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))


def rows_table(title: str, rows: list[dict[str, Any]], stream: TextIO | None = None) -> None:
    """Print a table on stderr with a column per key of the first row; nothing if there are no rows.

    Columns that do not fit the screen follow in further tables below, each of which repeats the first columns that
    tell the rows apart. Columns without any value are left out. Long paths follow on lines of their own, to be copied.
    """
    if not rows:
        return
    console = _console(stream)
    cells = {name: [str(row.get(name, "")) for row in rows] for name in rows[0]}
    cells = {name: values for name, values in cells.items() if any(values)}
    names = cells[next(iter(cells))]
    below: list[tuple[str, str]] = []
    for column, values in cells.items():
        for i, value in enumerate(values):
            if os.path.isabs(value) and len(value) > console.width // 3:
                below.append((column if len(rows) == 1 else f"{names[i]}, {column}", value))
                values[i] = os.path.basename(value)
    leading = [list(zip(*list(cells.values())[:k], strict=True)) for k in range(1, 1 + min(MOST_KEYS, len(cells)))]
    keys = next((k for k, heads in enumerate(leading, 1) if len(set(heads)) == len(rows)), 1)
    words = {name for name, values in cells.items() if not all(map(NUMBER.fullmatch, values))}
    console.print(title, style="bold")
    for columns in _tables(cells, words, console.width, keys):
        table = Table()
        for name, width in columns.items():
            table.add_column(name, justify="left" if name in words else "right", width=width, overflow="fold")
        for i in range(len(rows)):
            table.add_row(*(cells[name][i] for name in columns))
        console.print(table)
    _print_lines(console, below)


def _tables(cells: dict[str, list[str]], words: set[str], room: int, keys: int) -> list[dict[str, int]]:
    """Divide columns into tables no wider than `room`: the width of each column of each table, by name."""
    widths = {name: max(map(len, [*name.split(), *values, "-"])) for name, values in cells.items()}
    if _table_width(widths) > room:
        narrow = {name: max(room // 2 // keys, *map(len, name.split())) for name in words}
        widths = {name: min(width, narrow.get(name, width)) for name, width in widths.items()}
    repeated = {name: widths[name] for name in list(widths)[:keys]}
    tables = [dict(repeated)]
    for name in list(widths)[keys:]:
        if len(tables[-1]) > keys and _table_width(tables[-1] | {name: widths[name]}) > room:
            tables.append(dict(repeated))
        tables[-1][name] = widths[name]
    return tables


def _table_width(columns: dict[str, int]) -> int:
    return sum(width + 3 for width in columns.values()) + 1  # a line and two spaces around each column


def _console(stream: TextIO | None) -> Console:
    console = Console(file=stream or sys.stderr, markup=False, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = FILE_WIDTH
    return console


def summary_table(title: str, rows: list[tuple[str, str]], stream: TextIO | None = None) -> None:
    """Print a short two-column table on stderr.

    Paths are quoted as a shell needs it. Paths and commands that do not fit follow on lines of their own, to be copied.
    """
    rows = [(name, _quoted(value)) for name, value in rows]
    console = _console(stream)
    room = console.width - max((len(name) for name, _ in rows), default=0) - 7  # the table's lines and spaces
    below = [(name, value) for name, value in rows if len(value) > room and (value[:1] in "/'" or " --" in value)]
    table = Table(show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        if (name, value) not in below:
            table.add_row(name, value)
    console.print(title, style="bold")
    console.print(table)
    _print_lines(console, below)


def _print_lines(console: Console, lines: list[tuple[str, str]]) -> None:
    for name, value in lines:
        console.print(f"{name}: {_quoted(value)}", soft_wrap=True)


def _quoted(value: str) -> str:
    return shlex.quote(value) if os.path.isabs(value) and os.path.exists(value) else value
