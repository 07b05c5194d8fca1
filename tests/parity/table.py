"""What the harness found: a row for each combination, a column for each command, written as Markdown and CSV."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finhpc.errors import FinhpcError


@dataclass(frozen=True)
class Cell:
    """One command on one combination: the largest difference from the reference, a refusal, or a fault."""

    difference: float | None = None
    refusal: str | None = None
    fault: str | None = None

    def __str__(self) -> str:
        if self.fault is not None:
            return f"FAULT: {self.fault}"
        if self.refusal is not None:
            return f"refused: {self.refusal}"
        return "equal" if not self.difference else f"{self.difference:.1e}"


@dataclass
class Row:
    """A combination, by the names of its axes' values, and what each command made of it."""

    axes: dict[str, str]
    cells: dict[str, Cell] = field(default_factory=dict)

    def __str__(self) -> str:
        return " | ".join(self.axes.values())

    @contextmanager
    def column(self, name: str) -> Iterator[Callable[[float], None]]:
        """Run one command; the block reports its difference, refusals are recorded, and faults as well.

        A `FinhpcError` is a refusal, whatever else is raised is a fault.
        """
        worst: list[float] = []
        try:
            yield worst.append
        except FinhpcError as error:
            self.cells[name] = Cell(refusal=str(error).replace("\n", " "))
        except AssertionError as error:
            self.cells[name] = Cell(fault=_first_line(error))
        except Exception as error:
            self.cells[name] = Cell(fault=f"{type(error).__name__}: {_first_line(error)}")
        else:
            self.cells[name] = Cell(difference=max(worst, default=0.0))

    def faults(self) -> list[str]:
        return [f"{self}: {name}: {cell.fault}" for name, cell in self.cells.items() if cell.fault is not None]


@dataclass
class Table:
    """Rows of the same axes; `tolerances`: column -> what its difference may be, in words."""

    title: str
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def columns(self) -> list[str]:
        return list(dict.fromkeys(name for row in self.rows for name in row.cells))

    def faults(self) -> list[str]:
        return [fault for row in self.rows for fault in row.faults()]

    def summary(self) -> list[str]:
        """Markdown: for each column how many rows agree, the largest difference, how many were refused or failed."""
        lines = [
            "| column | rows that agree | largest difference | refused by name | faults |",
            "|---|---|---|---|---|",
        ]
        for name in self.columns():
            cells = [row.cells[name] for row in self.rows if name in row.cells]
            agree = [cell.difference for cell in cells if cell.difference is not None]
            refused, faults = (sum(getattr(cell, kind) is not None for cell in cells) for kind in ("refusal", "fault"))
            worst = max(agree, default=0.0)
            lines.append(f"| {name} | {len(agree)} | {worst:.1e} | {refused} | {faults} |")
        return lines

    def refused(self) -> list[str]:
        """Markdown: the refusals, each with how many rows have it and an example of the message."""
        found: dict[tuple[str, str], list[str]] = {}
        for row in self.rows:
            for axis, value in row.axes.items():
                messages = [cell.refusal for cell in row.cells.values() if cell.refusal is not None]
                if messages and len(messages) == len(row.cells):
                    found.setdefault((axis, value), []).append(messages[0])
        return [f"- {axis} {value}: {len(some)} rows, {some[0]}" for (axis, value), some in found.items()]

    def write(self, folder: Path, name: str) -> None:
        """Write NAME.md with the summary and every row, and NAME.csv with every row."""
        folder.mkdir(parents=True, exist_ok=True)
        columns, axes = self.columns(), list(self.rows[0].axes)
        head = [*axes, *columns]
        body: list[list[Any]] = [
            [*row.axes.values(), *(str(row.cells[name]) if name in row.cells else "" for name in columns)]
            for row in self.rows
        ]
        with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([head, *body])
        lines = [f"# {self.title}", "", *self.notes, "", f"{len(self.rows)} rows.", "", *self.summary(), ""]
        lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        lines += ["| " + " | ".join(str(value).replace("|", "\\|")[:160] for value in row) + " |" for row in body]
        (folder / f"{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
