"""Measured costs and the cut that is kept beside a run, in real process groups."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from finhpc.log import redirected
from finhpc.models.families.parts import BLOCK, HALVES
from finhpc.models.pipeline import parts_of
from finhpc.training.stages import Cut, measure_parts, saved_cut
from tests.training.processes import run_processes
from tests.training.test_engine import hf_config, settings

CPU = torch.device("cpu")


def _measure(case: str, recompute: str = "none") -> tuple[dict[str, float], bool]:
    config = settings(case, 2, 1, 2, recompute=recompute)
    state = torch.get_rng_state()
    return measure_parts(config, hf_config(config), CPU), bool(torch.equal(state, torch.get_rng_state()))


def test_all_processes_agree_on_the_costs_and_their_random_state_stays() -> None:
    for case in ("gpt2-tied-dense", "llama-low-rank-embedding"):
        (first, kept), (second, also) = run_processes(_measure, 2, case)
        assert first == second
        assert kept
        assert also
        kinds = {part.kind for part in parts_of(hf_config(settings(case, 2, 1, 2)))}
        assert set(first) == kinds >= set(HALVES)
        assert all(seconds > 0 for seconds in first.values())


def test_a_recomputed_block_is_measured_as_one_part() -> None:
    (seconds, _) = run_processes(_measure, 1, "llama-low-rank-embedding", "full")[0]
    assert seconds[BLOCK] > 0
    assert not set(HALVES) & set(seconds)


def _keep(file: Path, stages: int, recompute: str = "none", schedule: str = "1f1b") -> tuple[Cut, list[str]]:
    config = settings("gpt2-tied-dense", stages, 1, 4, recompute=recompute, schedule=schedule)
    said: list[str] = []
    with redirected(said.append):
        return saved_cut(config, hf_config(config), CPU, file), said


def test_a_saved_cut_is_used_by_all_until_the_stages_change_or_the_file_is_damaged(tmp_path: Path) -> None:
    file = tmp_path / "stages.json"
    (cut, said), (same, _) = run_processes(_keep, 2, file, 2)
    assert cut == same
    assert said == [f"stages cut by measured cost: {cut}"]

    other: dict[str, Any] = json.loads(file.read_text()) | {"costs_s": [1.0] * len(cut.kinds)}
    file.write_text(json.dumps(other))
    for found, said in run_processes(_keep, 2, file, 2):
        assert (found, said) == (Cut(**other), []), "taken as it stands"
    for found, _ in run_processes(_keep, 2, file, 2, "attention"):
        assert found == Cut(**other), "the same parts"

    ((three, _), *_) = run_processes(_keep, 3, file, 3)
    assert len(three.borders) == 4, "other stages are measured again"
    ((whole, _), *_) = run_processes(_keep, 2, file, 2, "full")
    assert whole.kinds.count(BLOCK) == 3, "other parts as well"
    ((dual, said), *_) = run_processes(_keep, 2, file, 2, "none", "dualpipev")
    assert len(dual.borders) == 5, "and another schedule"
    assert said[0].endswith(" per micro-batch; worker i has stages i and 3 - i)")

    file.write_text(json.dumps(other)[:-20])
    ((again, said), *_) = run_processes(_keep, 2, file, 2)
    assert said[0] == "stages.json is damaged: the stages are measured and cut again."
    assert json.loads(file.read_text())["costs_s"] == again.costs_s


def test_a_cut_is_named_by_its_blocks() -> None:
    parts = ["embedding", "positions", *("attention", "mlp") * 3, "norm", "head"]
    costs = [0.0, 0.0, *(0.5, 1.0) * 3, 0.0, 0.5]
    cut = Cut("1f1b", 2, parts, costs, [0, 5, 10])
    assert str(cut) == "embedding, positions, 1.5 blocks | 1.5 blocks, norm, head (2 s, 3 s per micro-batch)"
    assert str(Cut("1f1b", 2, parts, costs, [0, 8, 10])).endswith(
        "3 blocks | norm, head (4.5 s, 0.5 s per micro-batch)"
    )
    whole = Cut("1f1b", 2, ["embedding", BLOCK, BLOCK, "head"], [0.0, 1.0, 1.0, 1.0], [0, 2, 4])
    assert str(whole) == "embedding, 1 block | 1 block, head (1 s, 2 s per micro-batch)"
