"""Orders of passes, their times, and cuts for them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from finhpc.models.pipeline import parts_of, stage_borders
from finhpc.models.schedule import ideal_utilization, passes, passes_seconds, schedule_borders, stages_of
from finhpc.settings.training import Schedule

SIZES = [(2, 4), (2, 8), (3, 6), (3, 13), (4, 8), (4, 32)]


@pytest.mark.parametrize(("workers", "micro_batches"), [*SIZES, (1, 3), (3, 2)])
@pytest.mark.parametrize("name", ["1f1b", "dualpipev"])
def test_passes_are_in_the_order_of_deepspeeds_schedule(name: Schedule, workers: int, micro_batches: int) -> None:
    from deepspeed.runtime.pipe import schedule

    if name == "dualpipev" and micro_batches < 2 * workers:
        pytest.skip("DeepSpeed refuses it")
    kind = schedule.DualPipeVSchedule if name == "dualpipev" else schedule.TrainSchedule
    for worker, stages in enumerate(stages_of(name, workers)):
        theirs: list[Any] = [command for step in kind(micro_batches, workers, worker).steps() for command in step]
        order = [
            (stages[getattr(command, "phase", 0)], type(command) is schedule.ForwardPass)
            for command in theirs
            if type(command) in (schedule.ForwardPass, schedule.BackwardPass)
        ]
        assert list(passes(name, workers, worker, micro_batches)) == order


@pytest.mark.parametrize(("workers", "micro_batches"), SIZES)
def test_even_stages_reach_the_ideal_utilization(workers: int, micro_batches: int) -> None:
    seconds = passes_seconds("dualpipev", [0.5] * (2 * workers), micro_batches)
    dual = ideal_utilization("dualpipev", workers, micro_batches)
    assert micro_batches / seconds == pytest.approx(dual)
    plain = ideal_utilization("1f1b", workers, micro_batches)
    assert micro_batches / passes_seconds("1f1b", [1.0] * workers, micro_batches) == pytest.approx(plain)
    assert plain == micro_batches / (workers + micro_batches - 1)
    assert dual > plain


def test_a_cut_for_dualpipev_balances_workers_not_stages() -> None:
    """A head as costly as three of four blocks leaves worker 0 little of the blocks."""
    from tests.training.test_engine import hf_config, settings

    row = parts_of(hf_config(settings("gpt2-tied-dense", 1, 1, 1)))
    costs = [{"attention": 1.0, "mlp": 1.0, "head": 4.0}.get(part.kind, 0.0) for part in row]

    def stages(borders: list[int]) -> list[float]:
        return [sum(costs[a:b]) for a, b in pairwise(borders)]

    borders = schedule_borders(row, costs, "dualpipev", 2, 8)
    outer, inner, inner_too, head = stages(borders)
    assert outer + head == inner + inner_too == 5
    even = stages(stage_borders(row, costs, 4))
    assert passes_seconds("dualpipev", stages(borders), 8) < passes_seconds("dualpipev", even, 8)
    assert schedule_borders(row, costs, "1f1b", 2, 8) == stage_borders(row, costs, 2)
