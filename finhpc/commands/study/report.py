"""What a study shows: its tables on the screen, and its loss curves as a picture and on a page."""

from __future__ import annotations

import logging
import shlex
import textwrap
from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

import finhpc
from finhpc.commands.report.curves import Curve, Panel
from finhpc.commands.report.figures import Figure, make_figure
from finhpc.commands.report.page import render
from finhpc.commands.study.compare import Compared
from finhpc.screen import rows_table
from finhpc.settings.sweep import StudyConfig

if TYPE_CHECKING:
    from matplotlib.axes import Axes

log = logging.getLogger(__name__)

Row = dict[str, Any]
SMOOTH = 25  # the drawn training loss is a mean over so many steps
AXES = {  # axis -> title of its panel, text below, and how many of its unit one of the text's has
    "tokens": ("equal tokens", "tokens (millions)", 1e6),
    "time": ("equal time", "minutes: steps x seconds per step on a quiet machine", 60.0),
    "operations": ("equal operations", "operations (10^15)", 1e15),
}


def _two(form: str) -> Callable[[Any], str]:
    return lambda pair: f"{form.format(pair[0])} to {form.format(pair[1])}"


TIME, WITH_START = "time_to_reference_loss", "time_to_reference_loss_with_start"
Columns = dict[str, tuple[str, Callable[[Any], str], str]]  # key -> title, format, text for None
TUNING: Columns = {
    "variant": ("variant", str, ""),
    "runs": ("runs", str, ""),
    "tokens": ("tokens", "{:,}".format, "-"),
    "lrs": ("rates tried", lambda lrs: " ".join(f"{lr:g}" for lr in lrs), "-"),
    "lr": ("best", "{:g}".format, "-"),
    "lr_edge": ("at an edge", str, "no"),
    "val_loss": ("val loss", "{:.3f}".format, "-"),
}
SCREENING: Columns = {
    "variant": ("variant", str, ""),
    "params_total": ("params", lambda count: f"{count / 1e6:.2f}M", "-"),
    "lr": ("lr", "{:g}".format, "-"),
    "val_loss": ("val loss", "{:.3f}".format, "diverged"),
}
FINALS: Columns = {
    "variant": ("variant", str, ""),
    "params_total": ("params", lambda count: f"{count / 1e6:.2f}M", "-"),
    "lr": ("lr", "{:g}".format, "-"),
    "val_loss": ("val loss", "{:.3f}".format, "-"),
    "spread": ("spread", "{:.3f}".format, "-"),
    "final_val_loss": ("held-out loss", "{:.4f}".format, "-"),
    "final_val_loss_se": ("std error", "{:.4f}".format, "-"),
    "difference": ("difference", "{:+.4f}".format, "-"),
    "difference_ci95": ("difference, 95 %", _two("{:+.3f}"), "-"),
    "val_loss_at_equal_tokens": ("same tokens", "{:.3f}".format, "-"),
    "val_loss_at_equal_time": ("same time", "{:.3f}".format, "-"),
    "val_loss_at_equal_operations": ("same operations", "{:.3f}".format, "-"),
    "step_s": ("s/step", "{:.3f}".format, "-"),
    TIME: ("time", "{:.2f}".format, "never"),
    "time_to_reference_loss_ci95": ("time, 95 %", _two("{:.2f}"), "-"),
    WITH_START: ("with start", "{:.2f}".format, "never"),
    "operations_to_reference_loss": ("operations", "{:.2f}".format, "never"),
    "peak_memory_bytes": ("memory MB", lambda count: f"{count / 1e6:,.0f}", "-"),
    "epochs": ("epochs", "{:.2f}".format, "-"),
    "tuning_runs": ("tuning runs", str, "-"),
    "tuning_lr_edge": ("lr at an edge", str, "no"),
}


def figure(config: StudyConfig, every: dict[str, Compared]) -> Figure:
    """Training and validation loss against tokens, and validation loss against time and operations."""
    target = min(every[config.study.reference].curve.values())
    late = [
        loss for one in every.values() for run in one.runs for step, loss in run.curve.items() if step * 10 >= one.steps
    ]
    limits = min(late) - 0.15, max(late) + 0.15

    def draw_training(axes: Axes, ink: str) -> None:
        for i, one in enumerate(every.values()):
            for run in one.runs:
                steps, losses = _smooth(run.train)
                axes.plot([one.tokens_at(step) / 1e6 for step in steps], losses, color=f"C{i}", lw=0.8)
        axes.set_ylim(*limits)

    def draw_validation(axes: Axes, ink: str, axis: str) -> None:
        unit = AXES[axis][2]
        for i, (name, one) in enumerate(every.items()):
            start, along = every.get(str(config.study.variants[name].start)), one.by(axis)
            before = start.by(axis)(start.steps) if start and axis != "tokens" else 0.0
            for run in one.runs:
                x = [(before + along(step)) / unit for step in run.curve]
                axes.plot(x, list(run.curve.values()), color=f"C{i}", lw=0.5)
            label = f"{name}, after {start.name}" if start else name
            x = [(before + along(step)) / unit for step in one.curve]
            axes.plot(x, list(one.curve.values()), color=f"C{i}", lw=1.8, label=label)
        axes.axhline(target, color="grey", lw=0.7, ls="--")
        axes.set_ylim(*limits)

    panels = [Panel(f"training, mean of {SMOOTH} steps", AXES["tokens"][1], "training loss (nats)", draw_training)]
    for axis, (title, below, _) in AXES.items():
        panels.append(Panel(title, below, "validation loss (nats)", partial(draw_validation, axis=axis)))
    caption = f"Dashed: the lowest loss of {config.study.reference}."
    if (seeds := len(config.study.seeds)) > 1:
        caption = f"Thin: each of {seeds} seeds; thick: their mean. {caption}"
    if any(variant.start for variant in config.study.variants.values()):
        caption += " Curves of variants that start from another one's model begin at its end."
    above = textwrap.fill(f"{config.run.name}. {caption}", 110)
    drawn = make_figure("curves", "Loss curves", caption, panels, above)
    assert drawn is not None
    return drawn


def _smooth(train: Curve) -> tuple[list[int], Any]:
    """Steps and the running mean of the training loss."""
    width = max(1, min(SMOOTH, len(train) // 4))
    return list(train)[width - 1 :], np.convolve(list(train.values()), np.ones(width) / width, "valid")


def page(result: Row, drawn: Figure) -> str:
    """The study as one HTML page: notes, tables, curves."""
    return render(
        "finhpc.commands.study",
        "page.html.j2",
        [drawn],
        result=result,
        finals=texts(result["finals"], FINALS),
        tuning=texts(result["tuning"], TUNING),
        screening=texts(result["screening"], SCREENING),
        made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        version=finhpc.__version__,
    )


def show(result: Row) -> None:
    """Print the tables on stderr."""
    rows_table(f"screening of {result['study']}", texts(result["screening"], SCREENING))
    rows_table("tuning: runs per variant, and its best learning rate", texts(result["tuning"], TUNING))
    title = f"{result['study']}, finals; time and operations: to the lowest loss of {result['reference']}, over its own"
    rows_table(title, texts(result["finals"], FINALS))
    for note in result["notes"]:
        log.warning(note)
    log.info(f"written: report.html, result.json, table.csv and curves.png in {shlex.quote(result['folder'])}")


def texts(rows: list[Row], columns: Columns) -> list[dict[str, str]]:
    """Rows as text: short names, few digits; without columns that have no value in any row.

    The time with that of the starting model is shown if any variant has one.
    """
    shown = {
        key: column for key, column in columns.items() if column[2] != "-" or any(r[key] is not None for r in rows)
    }
    if all(row.get(WITH_START) == row.get(TIME) for row in rows):
        shown.pop(WITH_START, None)
    return [
        {title: absent if r[key] is None else form(r[key]) for key, (title, form, absent) in shown.items()}
        for r in rows
    ]
