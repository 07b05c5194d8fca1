"""One trial of a sweep: its settings, what its actor receives, and the outcome that it leaves in its run folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finhpc.files import write_json
from finhpc.runs.folder import RunFolder
from finhpc.runs.job import Job
from finhpc.settings.base import build
from finhpc.settings.finetune import FinetuneConfig
from finhpc.settings.pretrain import PretrainConfig
from finhpc.settings.training import TrainingConfig

BITS = "quantization.bits"
OUTCOME = "trial.json"  # in the run folder, once the trial has ended

Values = dict[str, Any]  # dotted key -> value


@dataclass(frozen=True)
class Trial:
    """One training.

    `values`: the settings that vary; `tree`: all settings, nested; `bits`: the widths at which the trained weights are
    scored; `start`: the name of the trial whose trained model this one starts from.
    """

    name: str
    values: Values
    settings: type[TrainingConfig]
    tree: dict[str, Any]
    bits: tuple[int, ...] = ()
    start: str | None = None

    def config(self, **sections: dict[str, Any]) -> TrainingConfig:
        """Its settings, with the keys of `sections` replaced."""
        tree = self.tree | {name: self.tree.get(name, {}) | values for name, values in sections.items()}
        return build(self.settings, tree)

    @property
    def points(self) -> list[tuple[str, Values]]:
        """(name, values) of each grid point that this training serves."""
        if not self.bits:
            return [(self.name, self.values)]
        return [
            (self.name if bits == 16 else f"{self.name}-{bits}bit", self.values | {BITS: bits}) for bits in self.bits
        ]


@dataclass(frozen=True)
class TrialArguments:
    """What the actor of a trial receives.

    `steps`: those of the training; `varied`: parameters that MLflow shows; `scores`: grid point -> bits.
    """

    config: TrainingConfig
    steps: int
    tags: dict[str, str]
    varied: Values
    scores: dict[str, int]

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.config.run.storage, self.config.run.name)

    def job(self) -> Job:
        from finhpc.commands.finetune import Finetune
        from finhpc.commands.pretrain import Pretrain

        job: Job
        if isinstance(self.config, FinetuneConfig):
            job = Finetune(self.config)
        else:
            assert isinstance(self.config, PretrainConfig)
            job = Pretrain(self.config)
        job.tags, job.varied = self.tags, self.varied
        return job


def read_record(run: Path) -> dict[str, Any]:
    """What `write_outcome` wrote; empty until the trial has ended."""
    path = run / OUTCOME
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return record


def read_outcome(run: Path) -> dict[str, Any]:
    """The outcome of the trial in a run folder, with the result of its training; empty until the trial has ended."""
    record = read_record(run)
    finished = record.get("status") == "finished"
    return ((RunFolder(run.parent, run.name).result() or {}) if finished else {}) | record


def write_outcome(run: Path, outcome: dict[str, Any]) -> None:
    """Record how a trial ended; the figures of a finished one are in its `result.json` already."""
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / OUTCOME, outcome)


def pruned(evaluation: dict[str, Any]) -> dict[str, Any]:
    """The outcome of a trial that the scheduler ended at `evaluation`."""
    return {"status": "pruned", **evaluation, "steps": evaluation["step"]}
