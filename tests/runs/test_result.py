"""What a run's result says, from what its journal holds."""

from __future__ import annotations

from typing import Any

from finhpc.runs.result import earlier_worker_hours, last_that_trained


def start(step: int) -> dict[str, Any]:
    return {"kind": "start", "step": step}


def test_the_figures_of_a_run_are_those_of_the_newest_start_that_took_a_step() -> None:
    first, second = {"kind": "train", "step": 1}, {"kind": "train", "step": 2}
    memory = {"kind": "memory", "step": 2}
    records = [start(0), first, start(1), second, memory, start(2), {"kind": "finished", "step": 2}]
    assert last_that_trained(records) == [start(1), second, memory]
    assert last_that_trained([start(0), {"kind": "message"}]) == [start(0), {"kind": "message"}]
    assert last_that_trained([{"kind": "message"}]) == []


def test_the_hours_of_earlier_starts_count_and_those_of_this_one_do_not_twice() -> None:
    first = [{"kind": "start", "step": 0, "time": 1000.0, "workers": 4}, {"kind": "train", "step": 1, "time": 1900.0}]
    now = [{"kind": "start", "step": 1, "time": 5010.0, "workers": 2}, {"kind": "train", "step": 2, "time": 5200.0}]
    resuming = [{"kind": "message", "time": 5009.0}]  # of this start, before it says that it begins
    restarted = [{"kind": "start", "step": 1, "time": 5300.0, "workers": 2}]
    assert earlier_worker_hours(first + resuming + now + restarted, 5000.0) == 1.0
    assert earlier_worker_hours(first + now, 900.0) == 0.0
