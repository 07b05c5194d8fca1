"""A sweep before it starts: every trial checked, what they cost, and how many run at a time."""

from __future__ import annotations

import logging
import math
import shutil
import statistics
import time
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finhpc.cluster.connect import check_fits, known_resources, use_cuda
from finhpc.commands.estimate.run_time import Opened, describe_run_time, sweep_time, this_machine_busy
from finhpc.commands.sweep.grid import BITS, AnySweep, Trial, check_points, trials_of
from finhpc.commands.sweep.trial import outcome_of
from finhpc.errors import ConfigError, collect
from finhpc.lowrank.registry import DENSE, STARTED
from finhpc.planning.plan import Plan, make_plan
from finhpc.runs.folder import RunFolder
from finhpc.runs.run import place_whole
from finhpc.screen import rows_table
from finhpc.settings.base import flatten
from finhpc.settings.finetune import FinetuneConfig, TrainingConfig
from finhpc.settings.pretrain import PretrainConfig
from finhpc.settings.sweep import FinetuneSweepConfig, SweepConfig
from finhpc.tracking.shown import PARENT, SWEEP, Dataset, model_name, parameters, shape_of
from finhpc.tracking.store import check_store
from finhpc.tracking.tracker import default_tracking_uri

if TYPE_CHECKING:
    from finhpc.commands.finetune import Finetune

log = logging.getLogger(__name__)

REFERENCE = "dense-reference"
MEASURING_S = 20.0  # spent on measuring the steps of trials; the rest are reckoned
SHOWN = 60  # trials listed before a sweep starts


@dataclass
class Planned:
    """A checked sweep. `reference`: the dense training that methods 2 and 3 start from, where no model is given."""

    config: AnySweep
    folder: Path
    trials: list[Trial]
    tracking_uri: str
    reference: PretrainConfig | None = None
    resources: dict[str, float] | None = None  # of the cluster; None: known once it is connected
    seconds: dict[str, float | None] = field(default_factory=dict)  # of a trial's training, estimated
    disk: dict[str, int] = field(default_factory=dict)  # bytes that a trial leaves at least
    parameters: list[dict[str, Any]] = field(default_factory=list)  # of each point, as MLflow shows them
    datasets: list[Dataset] = field(default_factory=list)  # of all trials
    steps: dict[str, int] = field(default_factory=dict)  # of a trial's training
    ratios: list[float] = field(default_factory=list)  # of measured steps to those that were reckoned
    opened: Opened = field(default_factory=Opened.now)
    measuring_until: float = field(default_factory=lambda: time.monotonic() + MEASURING_S)
    notes: dict[str, None] = field(default_factory=dict)  # what was guessed or left out of the trials' data

    @property
    def runs(self) -> Path:
        return self.folder / "trials"

    @property
    def shared(self) -> Path:
        return self.folder / "shared"

    def run_folder(self, name: str) -> Path:
        return self.runs / name

    def config_of(self, trial: Trial) -> TrainingConfig:
        """A trial's settings, placed below the sweep; paths whole, as its actor has another working directory."""
        config = trial.config(run=self._place(self.runs, trial.name))
        if self.reference is not None and _starts(trial):
            tree = {"path": str(self.shared / REFERENCE / "model")}
            config = config.model_copy(update={"model": type(config.model).model_validate(tree)})
        place_whole(config)
        return config

    def _place(self, storage: Path, name: str) -> dict[str, Any]:
        return {"storage": str(storage), "name": name, "tracking_uri": self.tracking_uri}

    @cached_property
    def alone(self) -> bool:
        """Whether every trial is a single worker, which trains in Tune's own actor."""
        return all(self.config_of(trial).parallel.workers == 1 for trial in self.trials)

    @property
    def cuda(self) -> bool:
        """Whether trials train on GPUs; not kept, because another cluster's are known once it is connected."""
        total = known_resources()
        return total is not None and use_cuda(self.config_of(self.trials[0]), total)

    def check_fits(self) -> None:
        """Raise `ConfigError` with every trial that the connected cluster could never place."""
        problems: list[str] = []
        for trial in self.trials:
            found: list[str] = []
            with collect(found):
                check_fits(self.config_of(trial), self.cuda, known_resources() or {})
            problems += [f"trial {trial.name}: {problem}" for problem in found]
        if problems:
            raise ConfigError(problems)

    def placement(self, name: str) -> Any:
        """What Tune reserves for a trial: its one worker's share, or nothing but a driver beside the workers."""
        from ray.tune import PlacementGroupFactory

        if not self.alone:
            return PlacementGroupFactory([{"memory": 1}])  # a byte: Tune takes no empty reservation
        resources = next(self.config_of(trial).resources for trial in self.trials if trial.name == name)
        bundle = {"CPU": resources.cpus_per_worker} | ({"GPU": resources.gpus_per_worker} if self.cuda else {})
        return PlacementGroupFactory([bundle])

    @property
    def concurrent(self) -> int:
        """Trials at a time: so many that the workers of all of them have a place, else drivers would wait for ever."""
        total = known_resources() or {}
        fits = [int(total.get("CPU", 1) / _cpus(self.config_of(trial))) for trial in self.trials]
        if self.cuda:
            configs = [self.config_of(trial) for trial in self.trials]
            fits += [int(total["GPU"] / (run.resources.gpus_per_worker * run.parallel.workers)) for run in configs]
        return max(1, min([*fits, len(self.trials), self.config.sweep.concurrent or len(self.trials)]))

    def told(self, trial: Trial, parent: str | None) -> dict[str, Any]:
        """What the actor of a trial is told."""
        tags = {PARENT: parent} if parent else {}
        tree = self.config_of(trial).model_dump(mode="json", exclude_unset=True)
        if isinstance(self.config, FinetuneSweepConfig):
            tree.setdefault("lora", {})
        scores = {name: values[BITS] for name, values in trial.points if trial.bits and values[BITS] != 16}
        tags |= {SWEEP: self.config.run.name}
        varied = dict(trial.values)
        if self.reference is not None and _starts(trial):
            # As the sweep has it: the reference would stand out as a model that varies.
            varied |= {"model": model_name(self.config)}
        return {"config": tree, "tags": tags, "varied": varied, "scores": scores}

    def shared_parameters(self) -> dict[str, Any]:
        """The parameters that all trials have in common."""
        first, *others = self.parameters
        return {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}

    @cached_property
    def cost(self) -> dict[str, Any] | None:
        """The time the remaining trials take (`finhpc.commands.estimate.run_time`); None if that of one is unknown."""
        left = [t for t in self.trials if "status" not in outcome_of(self.run_folder(t.name))]
        seconds = [self.seconds.get(trial.name) for trial in left]
        if not left or any(one is None for one in seconds):
            return None
        configs = [self.config_of(trial) for trial in left]
        each = max(config.parallel.workers * config.resources.threads for config in configs)
        processes = 0.0 if self.cuda else min(self.concurrent, len(left)) * float(each)
        scores = sum(bits != 16 for trial in left for bits in trial.bits)
        whole = math.fsum(one or 0.0 for one in seconds)
        return sweep_time(whole, len(left), scores, self.concurrent, processes, self.opened).numbers(
            this_machine_busy(self.opened)
        )

    @property
    def disk_bytes(self) -> int:
        """What the trials that have not begun will leave at least: their models and checkpoints."""
        return sum(self.disk[t.name] for t in self.trials if not self.run_folder(t.name).exists())

    def check_disk(self) -> None:
        """Raise `ConfigError` where the sweep cannot fit the disk."""
        free = free_bytes(self.folder)
        if self.disk_bytes > free:
            raise ConfigError(
                f"the sweep leaves at least {self.disk_bytes / 1e9:.1f} GB of models and checkpoints, and "
                f"run.storage={self.config.run.storage} has {free / 1e9:.1f} GB free; make room there, choose another, "
                "or keep fewer checkpoints (train.keep_checkpoints)."
            )

    def result(self) -> dict[str, Any]:
        """The keys that are known before anything runs."""
        ended = sum("status" in outcome_of(self.run_folder(trial.name)) for trial in self.trials)
        return {
            "sweep": self.config.run.name,
            "trained": len(self.trials),
            "scored": sum(len(trial.points) for trial in self.trials),
            "ended_before": ended,
            "concurrent": self.concurrent,
            "estimated_s": self.cost and self.cost["run_s"],
            "disk_bytes": self.disk_bytes,
            "folder": str(self.folder),
            "tracking_uri": self.tracking_uri,
        }


def plan_sweep(config: AnySweep, folder: Path) -> Planned:
    """Check the grid and every trial of it; raises one `ConfigError` with every problem."""
    problems: list[str] = []
    with collect(problems):
        check_points(config)
    # Of a grid without points, or with too many, what its trials share is checked all the same.
    trials = trials_of(config.model_copy(update={"grid": {}}) if problems else config)
    uri = config.run.tracking_uri or default_tracking_uri(config.run.storage)
    with collect(problems):
        check_store(uri, config.run.experiment)
    plan = Planned(config, folder, trials, uri, resources=known_resources())
    if isinstance(config, SweepConfig) and any(_starts(trial) for trial in trials) and config.model.path is None:
        plan.reference = _reference(plan)
    of: dict[str, list[str]] = {}  # problem -> the trials that have it
    checked: dict[str, _Checked] = {}
    for trial in trials:
        found: list[str] = []
        with collect(found):
            run = plan.config_of(trial)
            key = _same_plan(run)
            if key not in checked:
                checked[key] = _check(plan, trial, run)
            one = checked[key]
            found += one.problems
            plan.seconds[trial.name], plan.disk[trial.name], plan.steps[trial.name] = one.seconds, one.bytes, one.steps
            plan.parameters += [parameters(run, one.named, values) for _, values in trial.points]
        for problem in dict.fromkeys(found):
            of.setdefault(problem, []).append(trial.name)
    problems += [f"{_named(names, len(trials))}{problem}" for problem, names in of.items()]
    if problems:
        raise ConfigError(problems)
    plan.check_disk()
    return plan


def _named(names: list[str], total: int) -> str:
    """Which trials a problem is of; nothing where it is of all."""
    if len(names) == total:
        return ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"trial{'s' if len(names) > 1 else ''} {', '.join(names[:3])}{more}: "


def free_bytes(folder: Path) -> int:
    """Free on the disk of a folder, which need not be there yet."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(there).free


@dataclass
class _Checked:
    """What is known of a trial: problems, estimated seconds of training, bytes it leaves, steps, names and shape."""

    problems: list[str]
    seconds: float | None = None
    bytes: int = 0
    steps: int = 0
    named: dict[str, Any] = field(default_factory=dict)  # of its model and data


def _check(plan: Planned, trial: Trial, run: TrainingConfig) -> _Checked:
    found = _Checked([])
    with collect(found.problems):
        RunFolder(run.run.storage, run.run.name)
        if plan.resources is not None:
            check_fits(run, use_cuda(run, plan.resources), plan.resources)
    with collect(found.problems):
        if isinstance(run, FinetuneConfig):
            from finhpc.commands.finetune import Finetune

            job = Finetune(run)
            found.steps, found.named = job.config.train.steps, job.names()
            found.bytes = _left(job.config, job.counts()["params_trainable"])
            found.seconds = _tuning_seconds(plan, job)
            plan.datasets += [dataset for dataset in job.datasets if dataset not in plan.datasets]
            plan.notes |= dict.fromkeys(job.made.examples.notes)
        else:
            if plan.reference is not None and _starts(trial):  # its model is not there yet: a low-rank one is as large
                run = run.model_copy(update={"model": plan.reference.model}, deep=True)
                run.method.kind = "low_rank"
            made = make_plan(run)
            found.steps, found.seconds = run.train.steps, _seconds(plan, made)
            found.bytes = _left(run, made.params_total)
            found.bytes += sum(made.outline.stored_bytes(bits) for bits in trial.bits if bits != 16)
            dataset = Dataset.of_shards(made.shards)
            found.named = {"model": model_name(run), "dataset": dataset.name} | shape_of(made.hf_config)
            plan.datasets += [dataset] if dataset not in plan.datasets else []
    return found


def _seconds(plan: Planned, made: Plan) -> float | None:
    from finhpc.commands.estimate.pretraining import of_plan

    measures = time.monotonic() < plan.measuring_until
    return _computing(plan, of_plan(made, plan.cuda, here=plan.resources is not None, measures=measures))


def _tuning_seconds(plan: Planned, job: Finetune) -> float | None:
    from finhpc.commands.estimate.finetuning import of_examples
    from finhpc.commands.finetune import batches_of

    made, measures = job.made, time.monotonic() < plan.measuring_until
    examples, batches = made.examples, batches_of(job.config)
    here = plan.resources is not None
    numbers = of_examples(job.config, made.lora_model, examples, batches, plan.cuda, here, measures)
    return _computing(plan, numbers)


def _computing(plan: Planned, numbers: dict[str, Any]) -> float | None:
    """Seconds of a trial's steps and evaluations on cores of their own; those not measured go by those that were."""
    if numbers["step_s"] is None:
        return None
    ratio = float(numbers["step_s"] / numbers["reckoned_step_s"])
    if ratio != 1.0:
        plan.ratios.append(ratio)
        return float(numbers["computing_s"])
    return float(numbers["computing_s"]) * (statistics.median(plan.ratios) if plan.ratios else 1.0)


def _left(run: TrainingConfig, trained: int) -> int:
    """Bytes on disk after a training of so many parameters: the model and the checkpoints it keeps."""
    every = run.train.checkpoint_every or run.train.steps
    kept = min(run.train.keep_checkpoints, math.ceil(run.train.steps / every))
    moments = 2 if run.optimizer.name == "adamw8bit" else 8
    return trained * (4 + kept * (4 + moments))


def _reference(plan: Planned) -> PretrainConfig:
    """The dense training with the sweep's own settings, on the first of its seeds."""
    config = plan.config
    tree = config.model_dump(mode="json", exclude={"grid", "sweep"}, exclude_unset=True)
    tree["method"] = {"kind": DENSE}
    tree["run"] = tree.get("run", {}) | plan._place(plan.shared, REFERENCE)
    tree.pop("quantization", None)
    return PretrainConfig.model_validate(tree)


def _starts(trial: Trial) -> bool:
    return trial.tree.get("method", {}).get("kind") in STARTED


def _cpus(run: TrainingConfig) -> float:
    return run.parallel.workers * run.resources.cpus_per_worker


def _same_plan(run: TrainingConfig) -> str:
    """Equal for trials that are alike but in seed and optimiser."""
    flat = {key: value for key, value in flatten(run).items() if not key.startswith(("run.", "optimizer."))}
    return repr({key: value for key, value in flat.items() if key != "train.seed"})


def _shortened(plan: Planned) -> dict[str, list[str]]:
    """What is told of warm-ups that are too long -> the trials it is told of."""
    found: dict[str, list[str]] = {}
    for trial in plan.trials:
        if note := plan.config_of(trial).optimizer.shortened(plan.steps[trial.name]):
            found.setdefault(note, []).append(trial.name)
    return found


def _counted(names: list[str], trials: int) -> str:
    if len(names) == trials:
        return "every trial"
    return f"trial {names[0]}" if len(names) == 1 else f"{len(names)} trials, the first {names[0]}"


def show_plan(plan: Planned) -> None:
    """The trials and their cost, and what was guessed about their data, before any starts."""
    for note in plan.notes:
        log.info(note)
    rows = []
    for trial in plan.trials[:SHOWN]:
        seconds = plan.seconds.get(trial.name)
        rows.append(
            {
                "trial": trial.name,
                "state": outcome_of(plan.run_folder(trial.name)).get("status", ""),
                "scored at bits": ", ".join(map(str, trial.bits)) or "-",
                "estimated": "-" if seconds is None else str(timedelta(seconds=round(seconds))),
            }
        )
    for note, names in _shortened(plan).items():
        log.info(f"{_counted(names, len(plan.trials))}: {note}")
    numbers = plan.result()
    rows_table(f"sweep {numbers['sweep']}: {numbers['trained']} trials, {numbers['scored']} points scored", rows)
    if len(plan.trials) > SHOWN:
        log.info(f"and {len(plan.trials) - SHOWN} more")
    about = "" if plan.cost is None else f"; the sweep takes {describe_run_time(plan.cost)}"
    log.info(f"{plan.concurrent} at a time{about}; at least {plan.disk_bytes / 1e6:,.0f} MB on disk")
