"""The runs of a study, trained as trials of a sweep, with their losses by step."""

from __future__ import annotations

import csv
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finhpc.commands.report.curves import Curve
from finhpc.commands.study.variants import plan_trials
from finhpc.commands.sweep.trial import Trial, read_outcome
from finhpc.commands.sweep.tuning import train_trials
from finhpc.errors import ImplausibleError, TrainingFailedError
from finhpc.evaluation.sample_losses import SAMPLE_LOSSES
from finhpc.settings.pretrain import PretrainConfig
from finhpc.settings.sweep import StudyConfig
from finhpc.training.journal import WORKER_FILE, latest, read

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """One run of a study, with its validation and training losses by step; without curves if it diverged.

    `samples`: the loss of the trained model on each held-out sample, in their order; only of a final run.
    """

    variant: str
    trial: Trial
    config: PretrainConfig
    result: dict[str, Any] = field(default_factory=dict)
    curve: Curve = field(default_factory=dict)
    train: Curve = field(default_factory=dict)
    samples: tuple[float, ...] = ()

    @property
    def lr(self) -> float:
        return self.config.optimizer.lr

    @property
    def seed(self) -> int:
        return self.config.train.seed

    @property
    def tokens_per_step(self) -> int:
        return self.config.parallel.samples_per_step * self.config.data.seq_len

    @property
    def loss(self) -> float:
        """Validation loss after the last step, in nats; infinite if the run diverged."""
        return self.curve[max(self.curve)] if self.curve else float("inf")


def train(config: StudyConfig, named: list[tuple[str, Trial]]) -> list[Trained]:
    """Train (variant, run) pairs, as many at a time as the cluster has room for; runs that have ended are only read.

    Raises `TrainingFailedError` for a run that fails without diverging.
    """
    if not named:
        return []
    plan = plan_trials(config, [trial for _, trial in named])
    train_trials(plan)
    trained = []
    for variant, trial in named:
        folder = plan.run_folder(trial.name)
        outcome, run = read_outcome(folder), plan.config_of(trial)
        assert isinstance(run, PretrainConfig)
        if outcome["status"] == "diverged" or outcome.get("kind") == ImplausibleError.__name__:
            log.info(f"{trial.name} diverged; the study goes on without it")
            trained.append(Trained(variant, trial, run))
        elif outcome["status"] != "finished":
            raise TrainingFailedError(f"{trial.name} failed: {outcome['error']}")
        else:
            trained.append(_read(variant, trial, run, outcome, folder))
    return trained


def _read(variant: str, trial: Trial, run: PretrainConfig, outcome: dict[str, Any], folder: Path) -> Trained:
    records, _ = read(folder / WORKER_FILE)
    curve = {step: float(r["val_loss"]) for step, r in sorted(latest(records, "eval").items())}
    losses = {step: float(r["train_loss"]) for step, r in sorted(latest(records, "train").items())}
    samples: tuple[float, ...] = ()
    if run.data.final_samples:
        with open(folder / SAMPLE_LOSSES, encoding="utf-8") as file:
            samples = tuple(float(row["loss"]) for row in csv.DictReader(file))
    return Trained(variant, trial, run, outcome, curve, losses, samples)


def by_variant(finals: list[Trained]) -> dict[str, list[Trained]]:
    """Variant -> its runs, one per seed."""
    groups: dict[str, list[Trained]] = {}
    for one in finals:
        groups.setdefault(one.variant, []).append(one)
    return groups
