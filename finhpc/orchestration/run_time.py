"""How long a run takes from its command to its result: the start, the steps, the evaluations, the end.

A step is taken from what the parts of the model cost on this machine, in seconds of the CPU. What else the machine
does is taken from its load: where more processes want to compute than there are cores, each gets its share.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from finhpc.config import TrainingConfig
from finhpc.planning.pace import Pace

# Measured on two idle cores: seconds that one core computes. Ray's processes and the driver's own imports; a worker's
# imports of torch, DeepSpeed and Ray Train; the model's folder, MLflow and the leave from Ray after the last step.
RAY_S = 9.0
WORKER_S = 11.0
END_S = 6.0
TRIAL_S = 2.0  # of a trial of a sweep, beside its steps: its process is warm
SCORE_S = 3.0  # of a score of a small model at fewer bits
FORWARD = 1 / 3  # of the passes of a training step
STEP_S = 0.01  # of a step beside its passes: DeepSpeed's schedule, the journal
EXCHANGE_S = 0.002  # of a micro-batch between two stages on one machine
MEASURABLE_S = 2.0  # parts that take longer together, one of each kind, as reckoned, are not measured in a dry run


@dataclass(frozen=True)
class Busy:
    """A machine of `cores`, on which `others` processes compute, on average, beside ours."""

    cores: int
    others: float

    def slower(self, processes: float) -> float:
        """How much longer `processes` of ours take here than on cores of their own."""
        return max(1.0, (processes + self.others) / self.cores)

    def __str__(self) -> str:
        return f"{self.others:.1f} other processes on {self.cores} cores"


def this_machine_busy() -> Busy:
    """By the load of the last minute; a process that has just begun has no part in it yet."""
    return Busy(os.cpu_count() or 1, os.getloadavg()[0])


@dataclass(frozen=True)
class RunTime:
    """Seconds of each phase on cores of their own, and the processes that compute in it."""

    start_s: float
    steps_s: float
    evaluations_s: float
    end_s: float
    processes: float  # in steps and evaluations
    starting: float  # in the start: more than compute at a time later, as they import at once

    def on(self, machine: Busy) -> float:
        """Seconds of the whole run on a machine."""
        return (
            self.start_s * machine.slower(self.starting)
            + (self.steps_s + self.evaluations_s) * machine.slower(self.processes)
            + self.end_s * machine.slower(1)
        )

    def numbers(self, machine: Busy) -> dict[str, Any]:
        """What a dry run's result says of it: `run_s` as busy as the machine is, `run_idle_s` if it were not."""
        return {
            "start_s": self.start_s * machine.slower(self.starting),
            "evaluations_s": self.evaluations_s * machine.slower(self.processes),
            "end_s": self.end_s * machine.slower(1),
            "computing_s": self.steps_s + self.evaluations_s,  # on cores of their own
            "run_s": self.on(machine),
            "run_idle_s": self.on(Busy(machine.cores, 0.0)),
            "machine": str(machine),
        }


def measurable(pace: Pace, kinds: Sequence[str]) -> bool:
    """Whether one part of each kind takes so little, by the `pace` reckoned for all, that a dry run can measure it."""
    return sum(pace.stage_s) * len(set(kinds)) / len(kinds) <= MEASURABLE_S


def training_time(config: TrainingConfig, pace: Pace, eval_batches: int, cuda: bool, scoring_s: float = 0.0) -> RunTime:
    """Of a pretraining or finetuning by itself, whose evaluations take so many micro-batches a replica.

    `scoring_s`: of what is scored after the last step, in this process.
    """
    parallel, train, slowest = config.parallel, config.train, max(pace.stage_s)
    exchanged = EXCHANGE_S * parallel.micro_batches if parallel.stages > 1 else 0.0
    number = 1 if not train.eval_every else -(-train.steps // train.eval_every)
    evaluation_s = (eval_batches + parallel.stages - 1) * slowest * FORWARD
    return RunTime(
        RAY_S + WORKER_S,
        train.steps * (pace.step_s + STEP_S + exchanged),
        number * evaluation_s,
        END_S + scoring_s,
        0.0 if cuda else parallel.workers * config.resources.threads * pace.utilization,
        parallel.workers,
    )


def sweep_time(trials_s: float, number: int, scores: int, concurrent: int, processes: float) -> RunTime:
    """Of a sweep of `number` trials that compute for `trials_s` in all; `processes`: of the trials of one moment."""
    rest_s = number * TRIAL_S + scores * SCORE_S
    return RunTime(
        RAY_S + WORKER_S, (trials_s + rest_s) / concurrent, 0.0, END_S, processes, min(processes, number) or 1.0
    )


def said(numbers: dict[str, Any]) -> str:
    """The time of a whole run, in words."""
    now, idle = (str(timedelta(seconds=round(numbers[key]))) for key in ("run_s", "run_idle_s"))
    parts = f"starting takes {_short(numbers['start_s'])}, evaluations {_short(numbers['evaluations_s'])}"
    if numbers["run_s"] < 1.2 * numbers["run_idle_s"]:
        return f"about {now} ({parts})"
    return f"{idle} to {now}: the machine is busy ({numbers['machine']}; {parts})"


def _short(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else str(timedelta(seconds=round(seconds)))
