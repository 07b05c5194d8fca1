"""The results of a study: its table and the picture of its loss curves.

Times are steps times the seconds per step on a quiet machine (`finhpc.commands.study.step_times`), not the clock of
the runs themselves, which depends on what else the machine did.
"""

from __future__ import annotations

import logging
import shlex
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from finhpc.commands.sweep.trial import Trial
from finhpc.lowrank.registry import BLEND
from finhpc.screen import rows_table
from finhpc.settings.pretrain import PretrainConfig
from finhpc.settings.study import StudyConfig
from finhpc.training.journal import WORKER_FILE, latest, read

log = logging.getLogger(__name__)

Row = dict[str, Any]
Curve = dict[int, float]  # step -> loss in nats
WITHOUT_W = " without W"  # after a variant's name: its step once method 3 has dropped its dense weights W
COLUMNS = {  # of the tables on the screen
    "variant": "variant",
    "params_total": "params",
    "lr": "lr",
    "val_loss": "val loss",
    "spread": "spread",
    "val_loss_at_equal_time": "same time",
    "step_s": "s/step",
    "time_to_reference_loss": "time",
    "time_to_reference_loss_with_start": "with start",
}
DIGITS = {"time_to_reference_loss": 2, "time_to_reference_loss_with_start": 2}
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


def screening_rows(screened: list[Trained]) -> list[Row]:
    """A row per run of the screening; val_loss is null if it diverged."""
    return [
        {
            "variant": one.variant,
            "params_total": one.result.get("params_total"),
            "lr": one.lr,
            "val_loss": one.loss if one.curve else None,
        }
        for one in screened
    ]


def final_rows(config: StudyConfig, finals: list[Trained], seconds: Mapping[str, list[float]]) -> list[Row]:
    """A row per finalist; losses are means over the seeds, `spread` is the largest less the smallest.

    `seconds`: variant -> measured seconds per step. `val_loss_at_equal_time`: when the reference ends, or at the
    variant's own end if that is earlier. `time_to_reference_loss`: the first time its mean curve is as low as the
    reference's final loss, divided by the reference's whole time (null: never); `..._with_start` counts the training
    of the model it starts from too. `step_s_spread`: the largest less the smallest measured step time, divided by
    the median; small if the machine was quiet.
    """
    groups, reference = by_variant(finals), config.study.reference
    steps = {name: runs[0].config.train.steps for name, runs in groups.items()}
    time_of = {name: partial(time_at, runs[0].config, seconds, name) for name, runs in groups.items()}
    target, whole_s = mean_curve(groups[reference])[steps[reference]], time_of[reference](steps[reference])
    rows: list[Row] = []
    for name, runs in groups.items():
        curve = mean_curve(runs)
        start = config.study.variants[name].start
        before_s = time_of[start](steps[start]) if start else 0.0
        reached = first_below(curve, target)
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


def mean_curve(runs: list[Trained]) -> Curve:
    """The mean of the runs' validation losses at every step at which all of them were evaluated."""
    shared = set.intersection(*(set(run.curve) for run in runs))
    return {step: statistics.fmean(run.curve[step] for run in runs) for step in sorted(shared)}


def first_below(curve: Curve, target: float) -> float | None:
    """The step at which a curve, interpolated linearly, comes down to `target`; None: never."""
    points = list(curve.items())
    for i, (step, loss) in enumerate(points):
        if loss <= target:
            if i == 0:
                return float(step)
            before, above = points[i - 1]
            return before + (step - before) * (above - target) / (above - loss)
    return None


def at(curve: Mapping[int, float] | Mapping[float, float], where: float) -> float:
    """The curve at a step or a time, interpolated linearly; constant after its last point."""
    return float(np.interp(where, list(curve), list(curve.values())))


def ratios(rows: list[Row]) -> dict[str, float | None]:
    """`time_to_reference_loss_NAME` of every finalist."""
    return {f"time_to_reference_loss_{row['variant']}": row["time_to_reference_loss"] for row in rows}


def draw(
    config: StudyConfig, finals: list[Trained], rows: list[Row], seconds: Mapping[str, list[float]], path: Path
) -> None:
    """Draw training and validation loss against tokens, and validation loss against time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    per_step = config.parallel.samples_per_step * config.data.seq_len / 1e6
    whole = {row["variant"]: row["train_s"] / 60 for row in rows}
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(17, 5), layout="constrained")
    for i, (name, runs) in enumerate(by_variant(finals).items()):
        start, mean = config.study.variants[name].start, mean_curve(runs)
        clock = partial(time_at, runs[0].config, seconds, name)
        before = whole[start] if start else 0.0
        label = f"{name}, after {start}" if start else name
        for run in runs:
            left.plot(*_smooth(run.train, per_step), color=f"C{i}", lw=0.8)
            middle.plot([s * per_step for s in run.curve], list(run.curve.values()), color=f"C{i}", lw=0.5)
        middle.plot([s * per_step for s in mean], list(mean.values()), color=f"C{i}", lw=1.8, label=label)
        right.plot([before + clock(s) / 60 for s in mean], list(mean.values()), color=f"C{i}", lw=1.8, label=label)
    target = next(row["val_loss"] for row in rows if row["variant"] == config.study.reference)
    for axes in (middle, right):
        axes.axhline(target, color="grey", lw=0.7, ls="--")
        axes.set(ylabel="validation loss (nats)")
        axes.legend(fontsize=8)
    left.set(xlabel="tokens (millions)", ylabel="training loss (nats)", title=f"training, mean of {SMOOTH} steps")
    middle.set(xlabel="tokens (millions)", title="equal tokens")
    right.set(xlabel="minutes: steps x seconds per step on a quiet machine", title="equal time")
    tops = [loss for one in finals for step, loss in one.curve.items() if step * 10 >= one.config.train.steps]
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        axes.set_ylim(min(tops) - 0.15, max(tops) + 0.15)
    figure.suptitle(
        f"{config.run.name}: seeds {len(config.study.seeds)}; dashed: final loss of {config.study.reference}"
    )
    unfinished = path.with_name(f".{path.name}")
    figure.savefig(unfinished, dpi=110, format="png")
    pyplot.close(figure)
    unfinished.replace(path)


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
    return {short: _number(key, row[key]) for key, short in COLUMNS.items() if key in row}


def _number(key: str, value: Any) -> str:
    if value is None:
        return "diverged" if key == "val_loss" else "never" if key.startswith("time") else "-"
    if key == "params_total":
        return f"{value / 1e6:.2f}M"
    return value if isinstance(value, str) else f"{value:g}" if key == "lr" else f"{value:.{DIGITS.get(key, 3)}f}"
