"""The finals of a study compared: losses at equal tokens, time and operations, and the time to the reference's loss.

A run's validation curve is a function of its steps. A step has tokens; seconds, which are measured on a quiet machine
(`finhpc.commands.study.step_times`) and not taken from the run's own clock, which depends on what else the machine
did; and operations, which are counted. So the same curve is read at the reference's tokens, time or operations, with
linear interpolation between evaluations. Before its end a run's learning rate has not fallen yet: what a curve shows
there is more than a run of that length would reach.

Runs of one seed have the same data in the same order, so variants are compared seed by seed. The interval over seeds
is Student's (Student, The Probable Error of a Mean, Biometrika 6, 1908): mean +- t s / sqrt(n) with n - 1 degrees of
freedom, at 95 %; of ratios, that of their logarithms. It needs two seeds. With three, t is 4.3: it is as wide as so few
seeds deserve.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from finhpc.commands.report.curves import Curve, mean_curve, steps_to
from finhpc.commands.study.trained import Trained, by_variant
from finhpc.lowrank.registry import BLEND
from finhpc.settings.pretrain import PretrainConfig
from finhpc.settings.sweep import StudyConfig

Row = dict[str, Any]
Interval = tuple[float, float]
WITHOUT_W = " without W"  # after a variant's name: its step once method 3 has dropped its dense weights W
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Costs:
    """What steps cost, by variant, and by a variant's name + `WITHOUT_W`.

    `seconds`: measured, several per step; `operations`: counted, of a whole step.
    """

    seconds: Mapping[str, Sequence[float]]
    operations: Mapping[str, float]

    @cached_property
    def step_s(self) -> dict[str, float]:
        """The median seconds per step."""
        return {name: statistics.median(values) for name, values in self.seconds.items()}

    def time_at(self, run: PretrainConfig, name: str, step: float) -> float:
        """Seconds of training up to `step`."""
        return summed(run, self.step_s, name, step)

    def operations_at(self, run: PretrainConfig, name: str, step: float) -> float:
        """Operations of training up to `step`."""
        return summed(run, self.operations, name, step)


def summed(run: PretrainConfig, per_step: Mapping[str, float], name: str, step: float) -> float:
    """The costs of all steps up to `step`; method 3 pays for its dense weights W until it drops them."""
    if run.method.kind != BLEND:
        return step * per_step[name]
    blending = min(step, run.method.blend_steps(run.train.steps) - 1)
    return blending * per_step[name] + (step - blending) * per_step[name + WITHOUT_W]


@dataclass(frozen=True)
class Compared:
    """One variant's final runs. `curve`: the mean over the seeds, of validation losses by step."""

    name: str
    runs: list[Trained]
    costs: Costs

    @cached_property
    def curve(self) -> Curve:
        return mean_curve([run.curve for run in self.runs])

    @property
    def config(self) -> PretrainConfig:
        return self.runs[0].config

    @property
    def steps(self) -> int:
        return self.config.train.steps

    def tokens_at(self, step: float) -> float:
        return step * self.runs[0].tokens_per_step

    def time_at(self, step: float) -> float:
        return self.costs.time_at(self.config, self.name, step)

    def operations_at(self, step: float) -> float:
        return self.costs.operations_at(self.config, self.name, step)

    def by(self, axis: str) -> Callable[[float], float]:
        """Step -> tokens, time (in seconds) or operations."""
        return {"tokens": self.tokens_at, "time": self.time_at, "operations": self.operations_at}[axis]

    def loss_at(self, axis: str, where: float) -> float:
        """The mean curve at so many tokens, seconds or operations, or at its end if that is earlier."""
        along = self.by(axis)
        return at({along(step): loss for step, loss in self.curve.items()}, where)

    @cached_property
    def of_seed(self) -> dict[int, Trained]:
        return {run.seed: run for run in self.runs}

    def samples(self) -> np.ndarray[Any, np.dtype[np.float64]] | None:
        """The loss on each held-out sample, the mean over the seeds; None if they were not scored."""
        return np.mean([run.samples for run in self.runs], axis=0) if self.runs[0].samples else None


def compared(finals: list[Trained], costs: Costs) -> dict[str, Compared]:
    """Variant -> its final runs."""
    return {name: Compared(name, runs, costs) for name, runs in by_variant(finals).items()}


def final_rows(config: StudyConfig, finals: list[Trained], costs: Costs, epoch_tokens: int) -> list[Row]:
    """A row per finalist. `epoch_tokens`: of the training text.

    `val_loss` is the mean over the seeds of the last evaluation, and `spread` the largest less the smallest. The
    losses at equal tokens, time and operations are at the reference's end, or at the variant's own if that is earlier.
    """
    every = compared(finals, costs)
    reference = every[config.study.reference]
    rows: list[Row] = []
    for name, own in every.items():
        losses = [run.loss for run in own.runs]
        tokens, first = own.tokens_at(own.steps), own.runs[0]
        peaks = [peak for run in own.runs if (peak := _memory(run.result)) is not None]
        rows.append(
            {
                "variant": name,
                "params_total": first.result["params_total"],
                "lr": first.lr,
                "seeds": len(own.runs),
                "tokens": first.result["tokens"],
                "epochs": tokens / epoch_tokens,
                "val_loss": own.curve[own.steps],
                "spread": max(losses) - min(losses),
                **final_losses(own, reference),
                **{
                    f"val_loss_at_equal_{axis}": own.loss_at(axis, reference.by(axis)(reference.steps))
                    for axis in ("tokens", "time", "operations")
                },
                "step_s": costs.step_s[name],
                "step_s_spread": (max(costs.seconds[name]) - min(costs.seconds[name])) / costs.step_s[name],
                "train_s": own.time_at(own.steps),
                "operations": own.operations_at(own.steps),
                "peak_memory_bytes": max(peaks, default=None),
                **times_to_reference(own, reference, every.get(str(config.study.variants[name].start))),
            }
        )
    return rows


def _memory(result: Row) -> int | None:
    """The peak memory of all workers of a run together; None if it was not measured."""
    peaks = result.get("peak_memory_bytes") or [None]
    return None if None in peaks else sum(peaks)


def final_losses(own: Compared, reference: Compared) -> Row:
    """The losses of the trained models over all held-out samples of the final evaluation, compared with the reference.

    `..._se`: standard errors over the samples; that of the difference is smaller, because both models read the same
    samples. `..._ci95`: the interval of the difference over the seeds that both have.
    """
    samples, theirs = own.samples(), reference.samples()
    row: Row = dict.fromkeys(("final_val_loss", "final_val_loss_se", "difference", "difference_se", "difference_ci95"))
    row["final_val_tokens"] = own.runs[0].result.get("final_val_tokens")
    if samples is None or theirs is None:
        return row
    row |= {"final_val_loss": float(samples.mean()), "final_val_loss_se": standard_error(samples)}
    shared = [seed for seed in own.of_seed if seed in reference.of_seed]
    if not shared or len(samples) != len(theirs):
        return row
    pairs = [(own.of_seed[seed].samples, reference.of_seed[seed].samples) for seed in shared]
    differences = np.array([np.subtract(*pair) for pair in pairs])  # (seeds, samples)
    return row | {
        "difference": float(differences.mean()),
        "difference_se": standard_error(differences.mean(0)),
        "difference_ci95": interval(differences.mean(1).tolist()),
    }


def times_to_reference(own: Compared, reference: Compared, start: Compared | None) -> Row:
    """When the variant's loss is as low as the reference's lowest, over when the reference's is.

    `time_to_reference_loss` and `operations_to_reference_loss` are of the mean curves (null: never); `..._seeds`: the
    ratio of each seed that both have; `..._ci95`: the interval of the ratios, null if a seed never gets there;
    `..._with_start` counts the training of the model it starts from too.
    """
    reached, whole = _reached(own.curve, reference.curve)
    ratios: list[float | None] = []
    for seed, run in own.of_seed.items():
        if seed in reference.of_seed:
            step, end = _reached(run.curve, reference.of_seed[seed].curve)
            ratios.append(None if step is None else own.time_at(step) / reference.time_at(end))
    known = [ratio for ratio in ratios if ratio is not None]
    before_s = start.time_at(start.steps) if start else 0.0
    row: Row = {"steps_to_reference_loss": reached}
    row |= dict.fromkeys(("time_to_reference_loss", "time_to_reference_loss_with_start"))
    row |= {
        "time_to_reference_loss_seeds": ratios,
        "time_to_reference_loss_ci95": ratio_interval(known) if len(known) == len(ratios) else None,
        "operations_to_reference_loss": None,
    }
    if reached is not None:
        whole_s = reference.time_at(whole)
        row["time_to_reference_loss"] = own.time_at(reached) / whole_s
        row["time_to_reference_loss_with_start"] = (own.time_at(reached) + before_s) / whole_s
        row["operations_to_reference_loss"] = own.operations_at(reached) / reference.operations_at(whole)
    return row


def _reached(own: Curve, reference: Curve) -> tuple[float | None, float]:
    """The steps at which a curve is as low as the reference's lowest point (None: never), and the reference's own."""
    end = min(reference, key=lambda step: reference[step])
    return steps_to(own, reference[end]), end


def at(curve: Mapping[int, float] | Mapping[float, float], where: float) -> float:
    """The curve at a step or a time, interpolated linearly; constant before its first point and after its last."""
    return float(np.interp(where, list(curve), list(curve.values())))


def interval(values: Sequence[float]) -> Interval | None:
    """Student's 95 % interval of the mean; None for fewer than two values."""
    from scipy import stats

    if len(values) < 2:
        return None
    mean = statistics.fmean(values)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def ratio_interval(ratios: Sequence[float]) -> Interval | None:
    """The same of ratios, whose logarithms are compared: half as long is as far from equal as twice as long."""
    logs = interval([math.log(ratio) for ratio in ratios])
    return logs and (math.exp(logs[0]), math.exp(logs[1]))


def standard_error(samples: np.ndarray[Any, np.dtype[np.float64]]) -> float | None:
    """The standard error of the mean over held-out samples; None for a single one."""
    return float(samples.std(ddof=1) / math.sqrt(len(samples))) if len(samples) > 1 else None
