"""What a run's result says, from what its journal holds."""

from __future__ import annotations

from typing import Any

from finhpc.orchestration.outcome import _last_that_trained


def start(step: int) -> dict[str, Any]:
    return {"kind": "start", "step": step}


def test_the_figures_of_a_run_are_those_of_the_newest_start_that_took_a_step() -> None:
    first, second = {"kind": "train", "step": 1}, {"kind": "train", "step": 2}
    memory = {"kind": "memory", "step": 2}
    records = [start(0), first, start(1), second, memory, start(2), {"kind": "finished", "step": 2}]
    assert _last_that_trained(records) == [start(1), second, memory]
    assert _last_that_trained([start(0), {"kind": "message"}]) == [start(0), {"kind": "message"}]
    assert _last_that_trained([{"kind": "message"}]) == []
