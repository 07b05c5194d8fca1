"""A sweep before it starts: every trial checked, with its cost in time and on disk."""

from __future__ import annotations

import logging
import math
import shutil
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from finhpc.cluster.connect import check_fits, known_resources, use_cuda
from finhpc.commands.estimate.run_time import Opened, describe_run_time, sweep_time, this_machine_busy
from finhpc.commands.sweep.estimate import Estimate, Estimator
from finhpc.commands.sweep.grid import AnySweep, check_points, trials_of
from finhpc.commands.sweep.trial import BITS, Trial, TrialArguments, read_outcome
from finhpc.errors import ConfigError, collect
from finhpc.lowrank.registry import DENSE, STARTED
from finhpc.screen import duration, rows_table
from finhpc.settings.base import flatten
from finhpc.settings.pretrain import PretrainConfig
from finhpc.settings.sweep import Sweep
from finhpc.settings.training import TrainingConfig
from finhpc.tracking.describe import Dataset, model_name, parameters
from finhpc.tracking.store import check_store
from finhpc.tracking.tags import PARENT, SWEEP

log = logging.getLogger(__name__)

REFERENCE = "dense-reference"
SHOWN = 60  # trials listed before a sweep starts


@dataclass
class SweepPlan:
    """The trials of a sweep. `runs`: where their run folders are; `references`: dense trainings that others start from.

    `estimates`, `datasets` and `notes` (on the trials' data) are filled by `check_trials`.
    """

    config: TrainingConfig
    folder: Path
    runs: Path
    trials: list[Trial]
    options: Sweep
    references: list[Trial] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)  # of every trial's MLflow run
    estimates: dict[str, Estimate] = field(default_factory=dict)
    datasets: list[Dataset] = field(default_factory=list)
    notes: dict[str, None] = field(default_factory=dict)
    opened: Opened = field(default_factory=Opened.now)
    configs: dict[str, TrainingConfig] = field(default_factory=dict)

    @property
    def tracking_uri(self) -> str:
        return self.config.run.mlflow_uri

    @property
    def shared(self) -> Path:
        return self.folder / "shared"

    @property
    def everyone(self) -> list[Trial]:
        """The trials, after the references that they start from."""
        return [*self.references, *self.trials]

    def run_folder(self, name: str) -> Path:
        return (self.shared if name == REFERENCE else self.runs) / name

    def config_of(self, trial: Trial) -> TrainingConfig:
        """A trial's settings, placed in the sweep."""
        if trial.name not in self.configs:
            run = {"storage": str(self.run_folder(trial.name).parent), "name": trial.name}
            self.configs[trial.name] = trial.config(run=run | {"tracking_uri": self.tracking_uri})
        return self.configs[trial.name]

    @property
    def total(self) -> dict[str, float]:
        """What the cluster has; empty if unknown, as that of another cluster is until it is connected."""
        return known_resources() or {}

    @property
    def cuda(self) -> bool:
        """Whether trials train on GPUs."""
        return bool(self.total) and use_cuda(self.config_of(self.everyone[0]).resources, self.total)

    def check_placement(self) -> None:
        """Raise `ConfigError` with every trial that the cluster could never place."""
        problems: list[str] = []
        total, cuda = self.total, self.cuda
        for trial in self.everyone:
            found: list[str] = []
            with collect(found):
                check_fits(self.config_of(trial), cuda, total)
            problems += [f"trial {trial.name}: {problem}" for problem in found]
        if problems:
            raise ConfigError(problems)

    def reservations(self) -> dict[str, Any]:
        """What Tune reserves for each trial: the share of its one worker, or nothing if a trial has several workers.

        A trial with several workers drives them from Tune's actor; they reserve their own shares.
        """
        from ray.tune import PlacementGroupFactory

        configs, cuda = [self.config_of(trial) for trial in self.everyone], self.cuda
        several = any(config.parallel.workers > 1 for config in configs)
        reservations = {}
        for config in configs:
            share: dict[str, float] = {"memory": 1}  # one byte: Tune takes no empty reservation
            if not several:
                share = {"CPU": config.resources.cpus_per_worker}
                share |= {"GPU": config.resources.gpus_per_worker} if cuda else {}
            reservations[config.run.name] = PlacementGroupFactory([share])
        return reservations

    @property
    def concurrent(self) -> int:
        """Trials at a time: only as many as there is room for all their workers, or drivers would wait forever."""
        configs, total = [self.config_of(trial) for trial in self.everyone], self.total
        fits = [int(total.get("CPU", 1) / (c.parallel.workers * c.resources.cpus_per_worker)) for c in configs]
        if self.cuda:
            gpus = [config.resources.gpus_per_worker * config.parallel.workers for config in configs]
            fits += [int(total["GPU"] / needed) for needed in gpus]
        return max(1, min([*fits, len(configs), self.options.concurrent or len(configs)]))

    def arguments(self, trial: Trial, parent: str | None) -> TrialArguments:
        """What the actor of a trial receives; `parent`: the MLflow run of the sweep."""
        tags = self.tags | ({PARENT: parent} if parent else {})
        scores = {name: values[BITS] for name, values in trial.points if trial.bits and values[BITS] != 16}
        # The model of the sweep, not the one a trial starts from, which would look like a model that varies.
        varied = trial.values | ({"model": model_name(self.config)} if trial.start else {})
        return TrialArguments(self.config_of(trial), self.estimates[trial.name].steps, tags, varied, scores)

    def has_ended(self, trial: Trial) -> bool:
        """Whether nothing is left to do: a finished trial of fewer steps than it should have by now goes on."""
        outcome = read_outcome(self.run_folder(trial.name))
        early = bool(outcome.get("stopped_early"))
        finished = outcome.get("status") == "finished"
        shorter = finished and not early and outcome["steps"] < self.estimates[trial.name].steps
        return bool(outcome) and not shorter

    @cached_property
    def parameters(self) -> list[dict[str, Any]]:
        """The MLflow parameters of each grid point."""
        return [
            parameters(self.config_of(trial), self.estimates[trial.name].names, values)
            for trial in self.trials
            for _, values in trial.points
        ]

    def shared_parameters(self) -> dict[str, Any]:
        """The parameters that all trials have in common."""
        first, *others = self.parameters
        return {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}

    @cached_property
    def cost(self) -> dict[str, Any] | None:
        """The time of the remaining trials (`finhpc.commands.estimate.run_time`); None if that of one is unknown."""
        left = [trial for trial in self.everyone if not self.has_ended(trial)]
        seconds = [self.estimates[trial.name].seconds for trial in left]
        if not left or any(one is None for one in seconds):
            return None
        configs = [self.config_of(trial) for trial in left]
        each = max(config.parallel.workers * config.resources.threads for config in configs)
        processes = 0.0 if self.cuda else min(self.concurrent, len(left)) * float(each)
        scores = sum(bits != 16 for trial in left for bits in trial.bits)
        total_s = math.fsum(one or 0.0 for one in seconds)
        run_time = sweep_time(total_s, len(left), scores, self.concurrent, processes, self.opened)
        return run_time.numbers(this_machine_busy(self.opened))

    @property
    def disk_bytes(self) -> int:
        """What the trials that have not begun will leave at least: their models and checkpoints."""
        new = [trial for trial in self.trials if not self.run_folder(trial.name).exists()]
        return sum(self.estimates[trial.name].disk_bytes for trial in new)

    def result(self) -> dict[str, Any]:
        """The keys of the result that are known before anything runs."""
        return {
            "sweep": self.config.run.name,
            "trained": len(self.trials),
            "scored": sum(len(trial.points) for trial in self.trials),
            "ended_before": sum(self.has_ended(trial) for trial in self.trials),
            "concurrent": self.concurrent,
            "estimated_s": self.cost and self.cost["run_s"],
            "disk_bytes": self.disk_bytes,
            "folder": str(self.folder),
            "tracking_uri": self.tracking_uri,
        }


def plan_sweep(config: AnySweep, folder: Path) -> SweepPlan:
    """Check the grid and all its trials; raises one `ConfigError` with every problem."""
    problems: list[str] = []
    with collect(problems):
        check_points(config)
    # Without points, or with too many, the settings that all trials share are checked nevertheless.
    trials = trials_of(config.model_copy(update={"grid": {}}) if problems else config)
    with collect(problems):
        check_store(config.run.mlflow_uri, config.run.experiment)
    plan = SweepPlan(config, folder, folder / "trials", trials, config.sweep, tags={SWEEP: config.run.name})
    started = [trial for trial in trials if trial.tree.get("method", {}).get("kind") in STARTED]
    if started and config.model.path is None:
        _add_reference(plan, started)
    found = check_trials(plan)
    problems += [f"{_of_trials(names, len(plan.everyone))}{problem}" for problem, names in found.items()]
    if problems:
        raise ConfigError(problems)
    free = free_bytes(folder)
    if plan.disk_bytes > free:
        raise ConfigError(
            f"the sweep leaves at least {plan.disk_bytes / 1e9:.1f} GB of models and checkpoints, and "
            f"run.storage={config.run.storage} has {free / 1e9:.1f} GB free; make room there, choose another, or keep "
            "fewer checkpoints (train.keep_checkpoints)."
        )
    return plan


def _add_reference(plan: SweepPlan, started: list[Trial]) -> None:
    """Let the trials of methods 2 and 3 start from one dense training with the sweep's own settings."""
    tree = plan.config.model_dump(mode="json", exclude={"grid", "sweep", "quantization"}, exclude_unset=True)
    plan.references = [Trial(REFERENCE, {}, PretrainConfig, tree | {"method": {"kind": DENSE}})]
    model = {"path": str(plan.run_folder(REFERENCE) / "model")}
    plan.trials = [
        replace(trial, start=REFERENCE, tree=trial.tree | {"model": model}) if trial in started else trial
        for trial in plan.trials
    ]


def check_trials(plan: SweepPlan, timed: bool = True) -> dict[str, list[str]]:
    """Estimate every trial of a plan; returns each problem with the names of the trials that have it.

    `timed`: whether to estimate their time, for which steps are measured.
    """
    estimator = Estimator(known_resources(), timed)
    by_name = {trial.name: trial for trial in plan.everyone}
    known: dict[str, Estimate] = {}
    problems: dict[str, list[str]] = {}
    for name, trial in by_name.items():
        found: list[str] = []
        with collect(found):
            run = plan.config_of(trial)
            # Trials that differ in seed and optimizer alone cost the same.
            cheap = {key: value for key, value in flatten(run).items() if not key.startswith(("run.", "optimizer."))}
            key = repr(cheap | {"train.seed": None})
            if key not in known:
                start = plan.config_of(by_name[trial.start]) if trial.start in by_name else None
                known[key] = estimator.estimate(run, trial.bits, start)
            plan.estimates[name] = known[key]
            found += known[key].problems
        for problem in dict.fromkeys(found):
            problems.setdefault(problem, []).append(name)
    for estimate in known.values():
        plan.datasets += [dataset for dataset in estimate.datasets if dataset not in plan.datasets]
        plan.notes |= dict.fromkeys(estimate.notes)
    return problems


def _of_trials(names: list[str], total: int) -> str:
    """Which trials have a problem; empty if all have it."""
    if len(names) == total:
        return ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"trial{'s' if len(names) > 1 else ''} {', '.join(names[:3])}{more}: "


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of a folder, which need not exist yet."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(existing).free


def show_plan(plan: SweepPlan) -> None:
    """Print the trials with their cost, and notes on their data, before any starts."""
    for note in plan.notes:
        log.info(note)
    rows = []
    for trial in plan.trials[:SHOWN]:
        seconds = plan.estimates[trial.name].seconds
        rows.append(
            {
                "trial": trial.name,
                "state": read_outcome(plan.run_folder(trial.name)).get("status", ""),
                "scored at bits": ", ".join(map(str, trial.bits)) or "-",
                "estimated": "-" if seconds is None else duration(seconds),
            }
        )
    warmups: dict[str, list[str]] = {}  # note on a warm-up that is too long -> the trials that have it
    for trial in plan.trials:
        if warmup := plan.config_of(trial).optimizer.shortened(plan.estimates[trial.name].steps):
            warmups.setdefault(warmup, []).append(trial.name)
    for warmup, names in warmups.items():
        who = f"trial {names[0]}" if len(names) == 1 else f"{len(names)} trials, the first {names[0]}"
        log.info(f"{'every trial' if len(names) == len(plan.trials) else who}: {warmup}")
    numbers = plan.result()
    rows_table(f"sweep {numbers['sweep']}: {numbers['trained']} trials, {numbers['scored']} points scored", rows)
    if len(plan.trials) > SHOWN:
        log.info(f"and {len(plan.trials) - SHOWN} more")
    about = "" if plan.cost is None else f"; the sweep takes {describe_run_time(plan.cost)}"
    log.info(f"{numbers['concurrent']} at a time{about}; at least {plan.disk_bytes / 1e6:,.0f} MB on disk")
