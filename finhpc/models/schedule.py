"""The order of passes on each worker of a pipeline, the time they take, and the cut that is fastest for it.

    1f1b        worker i of N has stage i of N; each micro-batch goes through the workers once
    dualpipev   worker i of N has stages i and 2N - 1 - i of 2N, so the first and the last are on worker 0; each
                micro-batch goes to the last worker and back, and passes of both directions fill each other's gaps

The orders are those of DeepSpeed's `TrainSchedule` and `DualPipeVSchedule`, without its exchanges.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise, product
from typing import NamedTuple

from finhpc.models.families.parts import Part
from finhpc.models.pipeline import borders_of, stage_borders
from finhpc.settings.training import Schedule

FORWARD = 1 / 3  # the forward pass's share of a micro-batch's time on a stage
SIMULATED = 4  # micro-batches per stage that are simulated; more of them add the slowest worker's time each


class Pass(NamedTuple):
    """One pass of the next micro-batch through a stage."""

    stage: int
    forward: bool


def stages_of(schedule: Schedule, workers: int) -> list[tuple[int, ...]]:
    """The stages of each worker, in the order data flows through them."""
    if schedule == "dualpipev":
        return [(worker, 2 * workers - 1 - worker) for worker in range(workers)]
    return [(worker,) for worker in range(workers)]


def most_workers(schedule: Schedule, blocks: int, halves: bool) -> int:
    """The largest number of workers that a model of so many transformer blocks can be cut for; see `has_halves`."""
    return (blocks + 1) // 2 if schedule == "dualpipev" and not halves else blocks


def passes(schedule: Schedule, workers: int, worker: int, micro_batches: int) -> Iterator[Pass]:
    """Yield the passes of one worker in a step; a stage takes the micro-batches in their order."""
    stages = stages_of(schedule, workers)[worker]
    forward, backward = ([Pass(stage, way) for stage in stages] for way in (True, False))
    if schedule == "1f1b":
        begun = min(micro_batches, workers - worker)
        yield from forward * begun
        yield from (backward + forward) * (micro_batches - begun)
        yield from backward * begun
        return
    after = workers - 1 - worker  # workers beyond this one
    yield from forward[:1] * (2 * after)
    yield from forward * (worker + 1)
    yield from [backward[1], forward[1]] * after
    yield from [forward[0], backward[1], forward[1], backward[0]] * (micro_batches - 2 * workers + worker + 1)
    yield from [backward[1], forward[1], backward[0]] * after
    yield from backward[::-1] * (worker + 1)
    yield from backward[:1] * after


def ideal_utilization(schedule: Schedule, workers: int, micro_batches: int) -> float:
    """The share of a step in which a worker computes if stages are even, exchanges free, and backward passes twice
    as long as forward ones: M/(N+M-1) for 1f1b, as in the paper's section IV.B.
    """
    if schedule == "1f1b":
        return micro_batches / (workers + micro_batches - 1)
    return 6 * micro_batches / (6 * micro_batches + 4 * workers - 5)


def passes_seconds(schedule: Schedule, stage_s: Sequence[float], micro_batches: int) -> float:
    """The seconds of all passes of a step. `stage_s`: forward and backward pass of a micro-batch on each stage."""
    if schedule == "1f1b":  # the first micro-batch takes all stages; the others follow at the pace of the slowest
        return sum(stage_s) + (micro_batches - 1) * max(stage_s)
    workers = len(stage_s) // 2
    simulated = min(micro_batches, SIMULATED * workers)
    slowest = max(sum(stage_s[stage] for stage in stages) for stages in stages_of(schedule, workers))
    return _simulate(schedule, stage_s, workers, simulated) + (micro_batches - simulated) * slowest


def _simulate(schedule: Schedule, stage_s: Sequence[float], workers: int, micro_batches: int) -> float:
    """The time of the last pass's end. A pass begins when its worker and the pass before it are done."""
    rows = [list(passes(schedule, workers, worker, micro_batches)) for worker in range(workers)]
    ended: dict[tuple[Pass, int], float] = {}  # pass, micro-batch -> its end
    clock, at, taken = [0.0] * workers, [0] * workers, Counter[Pass]()
    while any(at[worker] < len(row) for worker, row in enumerate(rows)):
        for worker, row in enumerate(rows):
            while at[worker] < len(row):
                this = row[at[worker]]
                micro_batch = taken[this]
                ready = 0.0
                if before := _before(this, len(stage_s)):
                    if (before, micro_batch) not in ended:
                        break
                    ready = ended[before, micro_batch]
                share = FORWARD if this.forward else 1 - FORWARD
                clock[worker] = max(clock[worker], ready) + share * stage_s[this.stage]
                ended[this, micro_batch] = clock[worker]
                taken[this] += 1
                at[worker] += 1
    return max(clock)


def _before(this: Pass, stages: int) -> Pass | None:
    """The pass whose result a pass needs; None for the first."""
    if this.forward:
        return Pass(this.stage - 1, True) if this.stage else None
    return Pass(this.stage + 1, False) if this.stage < stages - 1 else Pass(this.stage, True)


def schedule_borders(
    row: list[Part], costs: list[float], schedule: Schedule, workers: int, micro_batches: int
) -> list[int]:
    """Return where each stage begins and the last ends, balanced by `costs` of the parts of `row`, in any unit.

    For dualpipev a worker's two stages count together: from a cut into even stages, borders move, one or neighboring
    ones at a time, as long as that makes the step shorter.
    """
    number = len(stages_of(schedule, workers)) * len(stages_of(schedule, workers)[0])
    borders = stage_borders(row, costs, number)
    if schedule == "1f1b":
        return borders
    allowed = set(borders_of(row))

    def seconds(borders: Sequence[int]) -> float:
        return passes_seconds(schedule, [sum(costs[a:b]) for a, b in pairwise(borders)], micro_batches)

    best, improved = seconds(borders), True
    while improved:
        improved = False
        for first, last, move in product(range(1, number), range(1, number), (-1, 1)):
            moved = [border + move * (first <= i <= last) for i, border in enumerate(borders)]
            valid = allowed.issuperset(moved[1:-1]) and all(a < b for a, b in pairwise(moved))
            if first <= last and valid and (shorter := seconds(moved)) < best * (1 - 1e-9):
                best, borders, improved = shorter, moved, True
    return borders
