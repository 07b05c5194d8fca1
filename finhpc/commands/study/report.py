"""The results of a study: its table and the picture of its loss curves.

Times are steps times the seconds per step on a quiet machine (`finhpc.commands.study.step_times`), not the clock of
the runs themselves, which depends on what else the machine did.
"""

from __future__ import annotations

import logging
import shlex
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finhpc.commands.report.curves import Curve, Panel, drawn, mean_curve, steps_to
from finhpc.commands.sweep.trial import Trial
from finhpc.lowrank.registry import BLEND
from finhpc.screen import rows_table
from finhpc.settings.pretrain import PretrainConfig
from finhpc.settings.study import StudyConfig
from finhpc.training.journal import WORKER_FILE, latest, read

if TYPE_CHECKING:
    from matplotlib.axes import Axes

log = logging.getLogger(__name__)

Row = dict[str, Any]
WITHOUT_W = " without W"  # after a variant's name: its step once method 3 has dropped its dense weights W
COLUMNS: dict[str, tuple[str, Callable[[Any], str], str]] = {  # key -> title on the screen, format, text for None
    "variant": ("variant", str, ""),
    "params_total": ("params", lambda count: f"{count / 1e6:.2f}M", "-"),
    "lr": ("lr", "{:g}".format, "-"),
    "val_loss": ("val loss", "{:.3f}".format, "diverged"),
    "spread": ("spread", "{:.3f}".format, "-"),
    "val_loss_at_equal_time": ("same time", "{:.3f}".format, "-"),
    "step_s": ("s/step", "{:.3f}".format, "-"),
    "time_to_reference_loss": ("time", "{:.2f}".format, "never"),
    "time_to_reference_loss_with_start": ("with start", "{:.2f}".format, "never"),
}
QUIET = 0.2  # the largest relative spread of step times at which their median is reliable
SMOOTH = 25  # the drawn training loss is a mean over so many steps


@dataclass(frozen=True)
class Trained:
    """One run of a study, with its validation and training losses by step; without curves if it diverged."""

    variant: str
    trial: Trial
    config: PretrainConfig
    result: Row = field(default_factory=dict)
    curve: Curve = field(default_factory=dict)
    train: Curve = field(default_factory=dict)

    @staticmethod
    def of(variant: str, trial: Trial, config: PretrainConfig, folder: Path, result: Row) -> Trained:
        """With the curves from the journal in the run folder."""
        records, _ = read(folder / WORKER_FILE)
        curve = {step: float(r["val_loss"]) for step, r in sorted(latest(records, "eval").items())}
        train = {step: float(r["train_loss"]) for step, r in sorted(latest(records, "train").items())}
        return Trained(variant, trial, config, result, curve, train)

    @property
    def lr(self) -> float:
        return self.config.optimizer.lr

    @property
    def loss(self) -> float:
        """Validation loss after the last step, in nats."""
        return self.curve[max(self.curve)]


def final_rows(config: StudyConfig, finals: list[Trained], seconds: Mapping[str, list[float]]) -> list[Row]:
    """A row per finalist; losses are means over the seeds, `spread` is the largest less the smallest.

    `seconds`: variant -> measured seconds per step. `val_loss_at_equal_time`: when the reference ends, or at the
    variant's own end if that is earlier. `time_to_reference_loss`: the first time its mean curve is as low as the
    reference's final loss, divided by the reference's whole time (null: never); `..._with_start` counts the training
    of the model it starts from too. `step_s_spread`: the largest less the smallest measured step time, divided by
    the median; small if the machine was quiet.
    """
    groups, reference = by_variant(finals), config.study.reference
    curves = {name: mean_curve([run.curve for run in runs]) for name, runs in groups.items()}
    steps = {name: runs[0].config.train.steps for name, runs in groups.items()}
    time_of = {name: partial(time_at, runs[0].config, seconds, name) for name, runs in groups.items()}
    target, whole_s = curves[reference][steps[reference]], time_of[reference](steps[reference])
    rows: list[Row] = []
    for name, runs in groups.items():
        curve, start = curves[name], config.study.variants[name].start
        before_s = time_of[start](steps[start]) if start else 0.0
        reached = steps_to(curve, target)
        reached_s = None if reached is None else time_of[name](reached)
        rows.append(
            {
                "variant": name,
                "params_total": runs[0].result["params_total"],
                "lr": runs[0].lr,
                "seeds": len(runs),
                "tokens": runs[0].result["tokens"],
                "val_loss": curve[steps[name]],
                "spread": max(run.loss for run in runs) - min(run.loss for run in runs),
                "val_loss_at_equal_time": at({time_of[name](step): loss for step, loss in curve.items()}, whole_s),
                "step_s": statistics.median(seconds[name]),
                "step_s_spread": (max(seconds[name]) - min(seconds[name])) / statistics.median(seconds[name]),
                "train_s": time_of[name](steps[name]),
                "steps_to_reference_loss": reached,
                "time_to_reference_loss": None if reached_s is None else reached_s / whole_s,
                "time_to_reference_loss_with_start": None if reached_s is None else (reached_s + before_s) / whole_s,
            }
        )
    return rows


def time_at(run: PretrainConfig, seconds: Mapping[str, list[float]], name: str, step: float) -> float:
    """Seconds of training up to `step`; method 3 pays for its dense weights W until it drops them."""
    step_s = statistics.median(seconds[name])
    if run.method.kind != BLEND:
        return step * step_s
    blending = min(step, run.method.blend_steps(run.train.steps) - 1)
    return blending * step_s + (step - blending) * statistics.median(seconds[name + WITHOUT_W])


def by_variant(finals: list[Trained]) -> dict[str, list[Trained]]:
    """Variant -> its runs, one per seed."""
    groups: dict[str, list[Trained]] = {}
    for one in finals:
        groups.setdefault(one.variant, []).append(one)
    return groups


def at(curve: Mapping[int, float] | Mapping[float, float], where: float) -> float:
    """The curve at a step or a time, interpolated linearly; constant after its last point."""
    return float(np.interp(where, list(curve), list(curve.values())))


def draw(config: StudyConfig, finals: list[Trained], rows: list[Row], seconds: Mapping[str, list[float]]) -> bytes:
    """Training and validation loss against tokens, and validation loss against time, as PNG."""
    per_step = config.parallel.samples_per_step * config.data.seq_len / 1e6
    whole = {row["variant"]: row["train_s"] / 60 for row in rows}
    target = next(row["val_loss"] for row in rows if row["variant"] == config.study.reference)
    tops = [loss for one in finals for step, loss in one.curve.items() if step * 10 >= one.config.train.steps]
    groups = by_variant(finals)

    def draw_training(axes: Axes, ink: str) -> None:
        for i, runs in enumerate(groups.values()):
            for run in runs:
                axes.plot(*_smooth(run.train, per_step), color=f"C{i}", lw=0.8)
        axes.set_ylim(min(tops) - 0.15, max(tops) + 0.15)

    def draw_validation(axes: Axes, ink: str, by_time: bool = False) -> None:
        for i, (name, runs) in enumerate(groups.items()):
            start, mean = config.study.variants[name].start, mean_curve([run.curve for run in runs])
            label = f"{name}, after {start}" if start else name
            before = whole[start] if start else 0.0
            at_s = partial(time_at, runs[0].config, seconds, name)
            x = [before + at_s(step) / 60 if by_time else step * per_step for step in mean]
            if not by_time:
                for run in runs:
                    axes.plot([step * per_step for step in run.curve], list(run.curve.values()), color=f"C{i}", lw=0.5)
            axes.plot(x, list(mean.values()), color=f"C{i}", lw=1.8, label=label)
        axes.axhline(target, color="grey", lw=0.7, ls="--")
        axes.set_ylim(min(tops) - 0.15, max(tops) + 0.15)

    tokens, minutes = "tokens (millions)", "minutes: steps x seconds per step on a quiet machine"
    panels = [
        Panel(f"training, mean of {SMOOTH} steps", tokens, "training loss (nats)", draw_training),
        Panel("equal tokens", tokens, "validation loss (nats)", draw_validation),
        Panel("equal time", minutes, "validation loss (nats)", partial(draw_validation, by_time=True)),
    ]
    title = f"{config.run.name}: seeds {len(config.study.seeds)}; dashed: final loss of {config.study.reference}"
    return drawn(config.run.name, panels, "black", "png", title)


def _smooth(train: Curve, per_step: float) -> tuple[Any, Any]:
    """Tokens and the running mean of the training loss."""
    width = max(1, min(SMOOTH, len(train) // 4))
    losses = np.convolve(list(train.values()), np.ones(width) / width, "valid")
    return np.array(list(train))[width - 1 :] * per_step, losses


def show(result: Row) -> None:
    """Print the tables on stderr."""
    rows_table(f"screening of {result['study']}", [_text(row) for row in result["screening"]])
    title = f"{result['study']}, finals; time: to the final loss of {result['reference']}, over its whole time"
    rows_table(title, [_text(row) for row in result["finals"]])
    if max(row["step_s_spread"] for row in result["finals"]) > QUIET:
        log.info("the machine was busy while step times were measured; the same command measures them again.")
    log.info(f"written: result.json, table.csv and curves.png in {shlex.quote(result['folder'])}")


def _text(row: Row) -> Row:
    """A row as text that fits a screen: short names, few digits."""
    return {
        title: absent if row[key] is None else form(row[key])
        for key, (title, form, absent) in COLUMNS.items()
        if key in row
    }
