"""Pictures of `finhpc bench serve`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finhpc.bench.report import Row


def draw_levels(rows: Sequence[Row], file: Path) -> None:
    """Throughput, time to the first token and time between tokens, over the number of users."""
    figure, (rate, first, between) = _axes(3)
    for way in dict.fromkeys(row["way"] for row in rows):
        mine = [row for row in rows if row["way"] == way]
        users = [row["users"] for row in mine]
        line = rate.plot(users, [row["tokens_per_s"] for row in mine], "o-", label=way)[0]
        for axes, name in ((first, "first_token"), (between, "token")):
            for point, style in ((50, "o-"), (95, "^--"), (99, "x:")):
                values = [row[f"{name}_p{point}_ms"] for row in mine]
                axes.plot(users, values, style, color=line.get_color(), label=f"{way}, p{point}", ms=4, lw=1)
    rate.set(ylabel="tokens/s", title="throughput", ylim=(0, None))
    first.set(ylabel="ms", title="time to the first token", yscale="log")
    between.set(ylabel="ms", title="time between tokens", yscale="log")
    counts = sorted({row["users"] for row in rows})
    for axes in (rate, first, between):
        axes.set(xlabel="users", xscale="log")
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(file, dpi=150)


def draw_soak(rows: Sequence[Row], blocks: int, file: Path) -> None:
    """Resident memory and blocks in use over time."""
    figure, (memory, cache) = _axes(2)
    minutes = [row["minute"] for row in rows]
    memory.plot(minutes, [row["resident_bytes"] / 1e6 for row in rows])
    memory.set(ylabel="MB", title="resident memory of the replica, largest of each minute", ylim=(0, None))
    cache.plot(minutes, [row["blocks_used"] for row in rows], label="in use, most of each minute")
    cache.axhline(blocks, color="k", ls="--", label="all")
    cache.set(title="blocks of the cache", ylim=(0, None))
    cache.legend(fontsize=8)
    for axes in (memory, cache):
        axes.set(xlabel="minutes")
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=150)


def _axes(count: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * count, 4), layout="constrained")
    return figure, figure.subplots(1, count)
