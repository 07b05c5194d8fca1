"""The table on the screen and the result.json of a measurement."""

from __future__ import annotations

import json
import os
import platform
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
SHORT, HEADER = 16, 8  # characters


def publish(
    name: str,
    out: str,
    conditions: Row,
    rows: list[Row],
    ratios: dict[str, float],
    began: float,
    columns: Sequence[str] = (),
    **more: Any,
) -> dict[str, Any]:
    """Print one table and the ratios, write result.json into a new folder of `out`, return its content.

    `conditions` says what was held equal (dtype and master weights, threads, batch, padding, whether
    Ray is on); each row is one way that was measured. `began`: `time.perf_counter()` at the start.
    `columns` selects what is printed, if all columns would be too wide. `more` goes into the result; a list of rows in
    it is printed as a table of its own.
    """
    folder = new_folder(name, out)
    result: dict[str, Any] = {
        "status": "finished",
        "bench": name,
        "conditions": conditions | machine(),
        "rows": rows,
        "ratios": ratios,
        **more,
        "folder": str(folder),
        "wall_s": time.perf_counter() - began,
    }
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    show(result, columns)
    return result


def new_folder(name: str, out: str) -> Path:
    """Create a new folder for one measurement."""
    stem = Path(os.path.abspath(os.path.expanduser(out))) / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder, again = stem, 1
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            again += 1
            folder = stem.with_name(f"{stem.name}-{again}")


def machine() -> Row:
    """The machine that measures."""
    import torch

    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor()
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def show(result: dict[str, Any], columns: Sequence[str]) -> None:
    """Print the tables and ratios of a result."""
    from rich.console import Console

    console = Console(stderr=True)
    shown = [{name: row[name] for name in columns or row} for row in result["rows"]]
    console.print(_table(f"bench {result['bench']}", shown))
    for name, value in result.items():
        if name != "rows" and isinstance(value, list):
            console.print(_table(name, [_largest(row) for row in value] if name == "profile" else value))
    console.print(", ".join(f"{name}: {_text(value)}" for name, value in result["conditions"].items()))
    for name, value in result["ratios"].items():
        console.print(f"{name} = {value:.3f}")
    console.print(f"written: {result['folder']}/result.json")


def _largest(row: Row) -> Row:
    """A row of a profile with its shares as words, the largest first, those of 1 % and more."""
    shares = {name: value for name, value in row.items() if isinstance(value, float)}
    words = [f"{name} {100 * value:.0f} %" for name, value in sorted(shares.items(), key=lambda x: -x[1])]
    shown = [word for word in words if not word.endswith(" 0 %")]
    return {name: value for name, value in row.items() if name not in shares} | {"time": ", ".join(shown)}


def _table(title: str, rows: list[Row]) -> Any:
    from rich.table import Table

    table = Table(title=title)
    for column in rows[0]:
        words = [row[column] for row in rows if isinstance(row[column], str)]
        short = max(map(len, words), default=SHORT + 1) <= SHORT  # a short name stays in one piece
        title = column.removesuffix("_bytes") + "_MB" if column.endswith("_bytes") else column
        title = textwrap.fill(title.replace("_", " "), HEADER, break_long_words=False)
        table.add_column(title, justify="left" if words else "right", no_wrap=short)
    for row in rows:
        megabytes = {k: v / 1e6 for k, v in row.items() if k.endswith("_bytes") and isinstance(v, int | float)}
        table.add_row(*(_text(value) for value in (row | megabytes).values()))
    return table


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 1 else f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
