"""How long a run takes from its command to its result: the start, the steps, the evaluations, the end.

The time of a step comes from what the model's parts cost on this machine in CPU seconds. How much of a CPU a process
gets at the moment is measured, because the load average also counts processes that only wait.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from finhpc.planning.step_time import Pace
from finhpc.screen import duration
from finhpc.settings.training import TrainingConfig

# Seconds of one core, measured on two cores of which other processes took a third.
RAY_S = 7.0  # starting Ray's processes
WORKER_S = 13.0  # a worker's imports of torch, DeepSpeed and Ray Train
END_S = 4.0  # after the last step: the model's folder, MLflow, disconnecting from Ray
TRIAL_S = 4.0  # a trial of a sweep, without its steps; its process is reused
SCORE_S = 3.0  # scoring a small model at fewer bits
STEP_S = 0.01  # a step without its passes: DeepSpeed's schedule, the journal
EXCHANGE_S = 0.002  # sending a micro-batch between two stages on one machine
FORWARD = 1 / 3  # the forward pass's share of a training step
SPIN_S = 0.5  # spent computing, to see how busy the machine is
MEASURABLE_S = 2.0  # a dry run does not measure parts that together (one of each kind) take longer than this
# Limits on what is read from this process's past: the seconds that the run will need again, and its slowdown.
MOST_OPENING_S = 30.0
MOST_SLOWER = 6.0


@dataclass(frozen=True)
class Busy:
    """How busy a machine is: the factors by which one process computes, and opens files, slower than on an idle one."""

    cores: int
    computing: float = 1.0
    opening: float = 1.0

    def slower(self, processes: float) -> float:
        """The factor by which `processes` of ours compute slower than on idle cores, if the others keep their share."""
        others = self.cores * self.computing - 1 if self.computing > 1 else 0.0
        return max(1.0, (processes + others) / self.cores)

    def starting(self, processes: float) -> float:
        """The factor by which they start slower."""
        return max(self.opening, self.slower(processes))


def this_machine_busy(opened: Opened) -> Busy:
    """How busy this machine is now: clock time over CPU time of a short computation, and of this process so far."""
    clock, busy = time.perf_counter(), time.thread_time()
    while time.thread_time() - busy < SPIN_S:
        pass
    computing = (time.perf_counter() - clock) / SPIN_S
    return Busy(os.cpu_count() or 1, max(1.0, computing), opened.slower)


@dataclass(frozen=True)
class Opened:
    """The CPU seconds that this process took so far, and the factor by which the clock time is longer."""

    cpu_s: float
    slower: float

    @staticmethod
    def now() -> Opened:
        cpu_s, clock_s = time.process_time(), time.time() - psutil.Process().create_time()
        if cpu_s > MOST_OPENING_S or clock_s > MOST_SLOWER * MOST_OPENING_S:  # a long-lived interpreter
            return Opened(min(cpu_s, MOST_OPENING_S), 1.0)
        return Opened(cpu_s, min(MOST_SLOWER, max(1.0, clock_s / cpu_s)))


@dataclass(frozen=True)
class RunTime:
    """Seconds of each phase on idle cores, and the number of processes that compute in it."""

    start_s: float
    steps_s: float
    evaluations_s: float
    end_s: float
    processes: float  # in steps and evaluations
    starting: float  # in the start, when all import at the same time

    def on(self, machine: Busy) -> float:
        """Seconds of the whole run on a machine."""
        return (
            self.start_s * machine.starting(self.starting)
            + (self.steps_s + self.evaluations_s) * machine.slower(self.processes)
            + self.end_s * machine.slower(1)
        )

    def numbers(self, machine: Busy) -> dict[str, Any]:
        """The figures of a dry run: `run_s` on the machine as busy as it is, `run_idle_s` on an idle one."""
        return {
            "start_s": self.start_s * machine.starting(self.starting),
            "evaluations_s": self.evaluations_s * machine.slower(self.processes),
            "end_s": self.end_s * machine.slower(1),
            "computing_s": self.steps_s + self.evaluations_s,  # on idle cores
            "run_s": self.on(machine),
            "run_idle_s": self.on(Busy(machine.cores)),
            "slower": machine.slower(self.processes),
        }


def measurable(pace: Pace, kinds: Sequence[str]) -> bool:
    """Whether one part of each kind is quick enough, by the calculated `pace` of all, for a dry run to measure it."""
    return sum(pace.stage_s) * len(set(kinds)) / len(kinds) <= MEASURABLE_S


def beside_passes_s(config: TrainingConfig) -> float:
    """The seconds of a step on this machine that are neither in a pass nor in the optimizer."""
    parallel = config.parallel
    return STEP_S + (EXCHANGE_S * parallel.micro_batches if parallel.stages > 1 else 0.0)


def training_time(
    config: TrainingConfig, pace: Pace, eval_batches: int, cuda: bool, opened: Opened, final_batches: float = 0
) -> RunTime:
    """The time of a single training whose evaluations have `eval_batches` micro-batches per replica.

    `opened`: the time that this process took to check the run, which the run will need again. `final_batches`:
    micro-batches that the trained model is scored on, by one worker.
    """
    parallel, train, slowest = config.parallel, config.train, max(pace.stage_s)
    number = 1 if not train.eval_every else -(-train.steps // train.eval_every)
    if parallel.schedule == "dualpipev":
        slowest, eval_batches = 2 * slowest, max(eval_batches, 2 * parallel.stages)  # two stages per worker
    evaluation_s = (eval_batches + parallel.stages - 1) * slowest * FORWARD
    return RunTime(
        opened.cpu_s + RAY_S + WORKER_S,
        train.steps * pace.step_s,
        number * evaluation_s + final_batches * sum(pace.stage_s) * FORWARD,
        END_S,
        0.0 if cuda else parallel.workers * config.resources.threads * pace.utilization,
        parallel.workers,
    )


def sweep_time(trials_s: float, number: int, scores: int, concurrent: int, processes: float, opened: Opened) -> RunTime:
    """The time of a sweep whose trials compute for `trials_s` in total; `processes`: of the concurrent trials."""
    start_s = opened.cpu_s + RAY_S + WORKER_S
    work_s = trials_s + number * TRIAL_S + scores * SCORE_S
    return RunTime(start_s, work_s / concurrent, 0.0, END_S, processes, min(processes, number) or 1.0)


def describe_run_time(numbers: dict[str, Any]) -> str:
    """The time of a whole run, in words."""
    now, idle = (duration(numbers[key]) for key in ("run_s", "run_idle_s"))
    parts = f"starting takes {duration(numbers['start_s'])}, evaluations {duration(numbers['evaluations_s'])}"
    if numbers["run_s"] < 1.2 * numbers["run_idle_s"]:
        return f"about {now} ({parts})"
    return f"{idle} to {now}, because the machine is busy (steps x {numbers['slower']:.1f}; {parts})"
