"""How long a run takes from its command to its result: the start, the steps, the evaluations, the end.

A step is taken from what the parts of the model cost on this machine, in seconds of the CPU. How much of a CPU a
process gets at the moment is tried out: the load average also counts processes that only wait.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psutil

from finhpc.planning.step_time import Pace
from finhpc.settings.finetune import TrainingConfig

# Measured on two cores that others took a third of: seconds that one core computes. Ray's processes; a worker's imports
# of torch, DeepSpeed and Ray Train; the model's folder, MLflow and the leave from Ray after the last step.
RAY_S = 7.0
WORKER_S = 13.0
END_S = 4.0
MOST_SLOWER = 6.0
SPIN_S = 0.5  # of computing, to see how busy the machine is
MOST_OPENING_S = 30.0  # of this process so far: imports, data and base, which the run opens again
TRIAL_S = 4.0  # of a trial of a sweep, beside its steps: its process is warm
SCORE_S = 3.0  # of a score of a small model at fewer bits
FORWARD = 1 / 3  # of the passes of a training step
STEP_S = 0.01  # of a step beside its passes: DeepSpeed's schedule, the journal
EXCHANGE_S = 0.002  # of a micro-batch between two stages on one machine
MEASURABLE_S = 2.0  # parts that take longer together, one of each kind, as reckoned, are not measured in a dry run


@dataclass(frozen=True)
class Busy:
    """How busy a machine of `cores` is: by what factor one process computes, and opens files, slower than it could."""

    cores: int
    computing: float = 1.0
    opening: float = 1.0

    def slower(self, processes: float) -> float:
        """How much longer `processes` of ours compute than on cores of their own: others take their share as before."""
        others = self.cores * self.computing - 1 if self.computing > 1 else 0.0
        return max(1.0, (processes + others) / self.cores)

    def starting(self, processes: float) -> float:
        """How much longer they take to start."""
        return max(self.opening, self.slower(processes))


def this_machine_busy(opened: Opened) -> Busy:
    """Of this machine now: a process that only computes, and this one since it began, by the clock over the CPU's."""
    clock, busy = time.perf_counter(), time.thread_time()
    while time.thread_time() - busy < SPIN_S:
        pass
    computing = (time.perf_counter() - clock) / SPIN_S
    return Busy(os.cpu_count() or 1, max(1.0, computing), opened.slower)


@dataclass(frozen=True)
class Opened:
    """What this process took to come here: CPU seconds, and by what factor the clock says more."""

    cpu_s: float
    slower: float

    @staticmethod
    def now() -> Opened:
        cpu_s, clock_s = time.process_time(), time.time() - psutil.Process().create_time()
        if cpu_s > MOST_OPENING_S or clock_s > MOST_SLOWER * MOST_OPENING_S:  # an interpreter that did other things
            return Opened(min(cpu_s, MOST_OPENING_S), 1.0)
        return Opened(cpu_s, min(MOST_SLOWER, max(1.0, clock_s / cpu_s)))


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
            self.start_s * machine.starting(self.starting)
            + (self.steps_s + self.evaluations_s) * machine.slower(self.processes)
            + self.end_s * machine.slower(1)
        )

    def numbers(self, machine: Busy) -> dict[str, Any]:
        """What a dry run's result says of it: `run_s` as busy as the machine is, `run_idle_s` if it were not."""
        return {
            "start_s": self.start_s * machine.starting(self.starting),
            "evaluations_s": self.evaluations_s * machine.slower(self.processes),
            "end_s": self.end_s * machine.slower(1),
            "computing_s": self.steps_s + self.evaluations_s,  # on cores of their own
            "run_s": self.on(machine),
            "run_idle_s": self.on(Busy(machine.cores)),
            "slower": machine.slower(self.processes),
        }


def measurable(pace: Pace, kinds: Sequence[str]) -> bool:
    """Whether one part of each kind takes so little, by the `pace` reckoned for all, that a dry run can measure it."""
    return sum(pace.stage_s) * len(set(kinds)) / len(kinds) <= MEASURABLE_S


def training_time(config: TrainingConfig, pace: Pace, eval_batches: int, cuda: bool, opened: Opened) -> RunTime:
    """Of a pretraining or finetuning by itself, whose evaluations take so many micro-batches a replica.

    `opened`: what this process took to check the run, which the run takes again.
    """
    parallel, train, slowest = config.parallel, config.train, max(pace.stage_s)
    exchanged = EXCHANGE_S * parallel.micro_batches if parallel.stages > 1 else 0.0
    number = 1 if not train.eval_every else -(-train.steps // train.eval_every)
    evaluation_s = (eval_batches + parallel.stages - 1) * slowest * FORWARD
    return RunTime(
        opened.cpu_s + RAY_S + WORKER_S,
        train.steps * (pace.step_s + STEP_S + exchanged),
        number * evaluation_s,
        END_S,
        0.0 if cuda else parallel.workers * config.resources.threads * pace.utilization,
        parallel.workers,
    )


def sweep_time(trials_s: float, number: int, scores: int, concurrent: int, processes: float, opened: Opened) -> RunTime:
    """Of a sweep of `number` trials that compute for `trials_s` in all; `processes`: of the trials of one moment."""
    start_s = opened.cpu_s + RAY_S + WORKER_S
    work_s = trials_s + number * TRIAL_S + scores * SCORE_S
    return RunTime(start_s, work_s / concurrent, 0.0, END_S, processes, min(processes, number) or 1.0)


def said(numbers: dict[str, Any]) -> str:
    """The time of a whole run, in words."""
    now, idle = (str(timedelta(seconds=round(numbers[key]))) for key in ("run_s", "run_idle_s"))
    parts = f"starting takes {_short(numbers['start_s'])}, evaluations {_short(numbers['evaluations_s'])}"
    if numbers["run_s"] < 1.2 * numbers["run_idle_s"]:
        return f"about {now} ({parts})"
    return f"{idle} to {now}, as busy as the machine is now (steps x {numbers['slower']:.1f}; {parts})"


def _short(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else str(timedelta(seconds=round(seconds)))
