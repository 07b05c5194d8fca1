"""What a trial of a sweep takes, estimated before it runs: time, disk, steps."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

from finhpc.cluster.connect import check_fits, use_cuda
from finhpc.errors import collect
from finhpc.lowrank.registry import STARTED
from finhpc.planning.plan import describe_compression, make_plan
from finhpc.runs.folder import RunFolder
from finhpc.settings.finetune import FinetuneConfig
from finhpc.settings.pretrain import PretrainConfig
from finhpc.settings.training import TrainingConfig
from finhpc.tracking.describe import Dataset, model_name, shape_of
from finhpc.training.optimizers.stage import state_bytes

MEASURING_S = 20.0  # spent on measuring the steps of trials; the time of further ones is calculated


@dataclass
class Estimate:
    """What is known of a trial before it runs.

    `params`: those that are trained; `seconds`: of computing, on cores of its own; `disk_bytes`: what it leaves at
    least; `names`: of its model and data, as MLflow shows them; `notes`: what was guessed or skipped in its data.
    """

    problems: list[str] = field(default_factory=list)
    params: int = 0
    steps: int = 0
    seconds: float | None = None
    disk_bytes: int = 0
    names: dict[str, Any] = field(default_factory=dict)
    datasets: list[Dataset] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Estimator:
    """Estimates trial after trial. `resources`: of the cluster, None if it is not connected."""

    def __init__(self, resources: dict[str, float] | None, timed: bool = True) -> None:
        self.resources, self.timed = resources, timed
        self.measuring_until = time.monotonic() + MEASURING_S
        self.ratios: list[float] = []  # measured over calculated seconds per step

    def estimate(self, run: TrainingConfig, bits: tuple[int, ...], start: TrainingConfig | None = None) -> Estimate:
        """Check and estimate a trial that is also scored at `bits`.

        `start`: the run whose model it starts from, if that is not trained yet.
        """
        from finhpc.training.compiler import check_compiler

        estimate, cuda = Estimate(), False
        with collect(estimate.problems):
            RunFolder(run.run.storage, run.run.name)
            if self.resources is not None:
                cuda = use_cuda(run.resources, self.resources)
                check_fits(run, cuda, self.resources)
                if not cuda:
                    check_compiler(run.train.compile, "cpu")
        with collect(estimate.problems):
            if isinstance(run, FinetuneConfig):
                self._finetuning(estimate, run, cuda)
            else:
                assert isinstance(run, PretrainConfig)
                self._pretraining(estimate, run, cuda, bits, start)
        return estimate

    def _pretraining(
        self, estimate: Estimate, run: PretrainConfig, cuda: bool, bits: tuple[int, ...], start: TrainingConfig | None
    ) -> None:
        from finhpc.commands.estimate.pretraining import of_plan

        if start is not None:  # a low-rank model from scratch is as large as one made from the coming dense model
            run = run.model_copy(update={"model": start.model}, deep=True)
            if run.method.kind in STARTED:
                run.method.kind = "low_rank"
        plan = make_plan(run)
        estimate.params, estimate.steps = plan.params_total, run.train.steps
        if self.timed:
            estimate.seconds = self._seconds(of_plan(plan, cuda, self.resources is not None, self._measures))
        estimate.disk_bytes = disk_bytes(run, plan.params_total, plan.outline.moments_bytes(run.optimizer))
        estimate.disk_bytes += sum(plan.outline.stored_bytes(width) for width in bits if width != 16)
        if plan.compression_ratio < 1:
            estimate.notes.append(f"method.rank={run.method.rank}: {describe_compression(plan.compression_ratio)}")
        dataset = Dataset.of_shards(plan.shards)
        estimate.names = {"model": model_name(run), "dataset": dataset.name} | shape_of(plan.hf_config)
        estimate.datasets = [dataset]

    def _finetuning(self, estimate: Estimate, run: FinetuneConfig, cuda: bool) -> None:
        from finhpc.commands.estimate.finetuning import of_examples
        from finhpc.commands.finetune import Finetune, batches_of

        job = Finetune(run)
        estimate.steps, estimate.names = job.config.train.steps, job.names()
        estimate.params = job.counts()["params_trainable"]
        moments = state_bytes(job.lora_model.adapter_shapes.items(), job.config.optimizer)
        estimate.disk_bytes = disk_bytes(job.config, estimate.params, moments)
        if self.timed:
            batches, here = batches_of(job.config, job.examples), self.resources is not None
            numbers = of_examples(job.config, job.lora_model, job.examples, batches, cuda, here, self._measures)
            estimate.seconds = self._seconds(numbers)
        estimate.datasets, estimate.notes = list(job.datasets), list(job.examples.notes)

    @property
    def _measures(self) -> bool:
        return time.monotonic() < self.measuring_until

    def _seconds(self, numbers: dict[str, Any]) -> float | None:
        """Seconds of steps and evaluations; calculated ones are corrected by what measured ones showed."""
        if numbers["step_s"] is None:
            return None
        ratio = float(numbers["step_s"] / numbers["reckoned_step_s"])
        if ratio != 1.0:
            self.ratios.append(ratio)
            return float(numbers["computing_s"])
        return float(numbers["computing_s"]) * (statistics.median(self.ratios) if self.ratios else 1.0)


def disk_bytes(run: TrainingConfig, trained: int, moments: int) -> int:
    """What a training leaves on disk, with so many parameters and bytes of optimizer state: a model and checkpoints."""
    every = run.train.checkpoint_every or run.train.steps
    kept = min(run.train.keep_checkpoints, math.ceil(run.train.steps / every))
    if isinstance(run, FinetuneConfig) and run.train.best_by is not None:
        kept += 1
    return 4 * trained + kept * (4 * trained + moments)
