"""How long a run takes from its command to its result, and what a busy machine makes of it."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest

import finhpc
from finhpc.commands.estimate.measure_parts import part_seconds
from finhpc.commands.estimate.run_time import (
    EXCHANGE_S,
    TRIAL_S,
    Busy,
    Opened,
    beside_passes_s,
    describe_run_time,
    measurable,
    sweep_time,
    this_machine_busy,
    training_time,
)
from finhpc.commands.sweep.command import sweep
from finhpc.planning.plan import make_plan
from finhpc.planning.step_time import Pace
from finhpc.settings.base import build
from finhpc.settings.pretrain import PretrainConfig
from finhpc.settings.sweep import SweepConfig
from tests.tiny import pretrain_tree

IDLE, HERE = Busy(2), Opened(5.0, 1.0)


def settings(**sections: Any) -> PretrainConfig:
    tree: dict[str, Any] = {"train": {"steps": 100, "eval_every": 50}, "data": {"eval_samples": 8}}
    return build(PretrainConfig, tree | sections)


def test_starting_evaluations_and_the_end_count() -> None:
    pace = Pace([0.03, 0.06], 0.0, 0.0, 4)
    whole = training_time(settings(parallel={"stages": 2, "micro_batches": 4}), pace, 8, False, HERE)
    assert whole.steps_s == pytest.approx(100 * pace.step_s)
    staged = settings(parallel={"stages": 2, "micro_batches": 4})
    assert beside_passes_s(staged) - beside_passes_s(settings()) == pytest.approx(4 * EXCHANGE_S)
    assert whole.evaluations_s == pytest.approx(2 * 9 * 0.06 / 3)
    assert whole.on(IDLE) > whole.steps_s + 15
    later = training_time(settings(), pace, 8, False, Opened(25.0, 1.0)).on(IDLE)
    assert later - training_time(settings(), pace, 8, False, HERE).on(IDLE) == pytest.approx(20)
    never = training_time(settings(train={"steps": 100, "eval_every": 0}), pace, 8, False, HERE)
    assert never.evaluations_s < whole.evaluations_s, "there is one after the last step"
    scored = training_time(settings(), pace, 8, False, HERE, final_batches=10)
    plain = training_time(settings(), pace, 8, False, HERE)
    assert scored.evaluations_s - plain.evaluations_s == pytest.approx(10 * 0.09 / 3), "both stages by one worker"


def test_a_busy_machine_gives_each_process_its_share() -> None:
    assert IDLE.slower(1) == IDLE.slower(2) == 1.0
    assert Busy(2, 3.0).slower(1) == 3.0, "as it was tried out"
    assert Busy(2, 3.0).slower(2) == 3.5, "five others stay"
    assert Busy(2, 1.0, 4.0).slower(2) == 1.0
    assert Busy(2, 1.0, 4.0).starting(2) == 4.0, "disks may be busy where cores are not"
    whole = training_time(settings(), Pace([0.1], 0.0, 0.0, 1), 8, False, HERE)
    numbers = whole.numbers(Busy(2, 4.0))
    assert numbers["run_idle_s"] == pytest.approx(whole.on(IDLE))
    assert numbers["run_s"] == pytest.approx(4 * whole.on(IDLE))
    assert " to " in describe_run_time(numbers)
    assert "steps x 4.0" in describe_run_time(numbers)
    assert describe_run_time(whole.numbers(IDLE)).startswith("about 40 s (starting takes 25 s")


def test_how_busy_this_machine_is_is_tried_out() -> None:
    here = this_machine_busy(Opened(3.0, 2.0))
    assert here.opening == 2.0
    assert 1.0 <= here.computing < 50
    assert Opened.now().slower >= 1.0


def test_trials_of_a_sweep_share_one_start() -> None:
    alone, together = (sweep_time(40.0, 4, 0, concurrent, concurrent, HERE).on(IDLE) for concurrent in (1, 2))
    assert alone - together == pytest.approx((40.0 + 4 * TRIAL_S) / 2)
    assert sweep_time(40.0, 4, 8, 1, 1.0, HERE).on(IDLE) > alone + 8


def test_only_what_is_small_is_measured() -> None:
    kinds = ["embedding", *["attention", "mlp"] * 30, "head"]
    assert measurable(Pace([4.0], 0.0, 0.0, 1), kinds), "four seconds of thirty blocks, of which one is measured"
    assert not measurable(Pace([4.0], 0.0, 0.0, 1), ["embedding", "attention", "mlp", "head"])


def burn(until: float) -> None:
    while time.time() < until:
        pass


@pytest.mark.slow
def test_what_parts_cost_does_not_depend_on_what_else_the_machine_does(run_shards: Path) -> None:
    config = settings(
        model={"preset": "gpt2-tiny", "layers": 1, "width": 128, "context": 64},
        data={"shards": str(run_shards), "seq_len": 64},
        parallel={"micro_batch_size": 8},
    )
    hf_config = make_plan(config).hf_config
    quiet = sum(part_seconds(config, hf_config).values())
    others = [multiprocessing.get_context("fork").Process(target=burn, args=(time.time() + 4,)) for _ in range(6)]
    for other in others:
        other.start()
    busy = sum(part_seconds(config, hf_config).values())
    for other in others:
        other.join()
    assert 0.4 < busy / quiet < 2.5, "six processes more than two cores would make it four times as long"


@pytest.fixture
def tree(run_shards: Path, tmp_path: Path) -> dict[str, Any]:
    return pretrain_tree(run_shards, tmp_path, train={"steps": 40, "eval_every": 20})


def test_a_dry_run_says_how_long_all_of_it_takes(tree: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    numbers = finhpc.pretrain(build(PretrainConfig, tree), dry_run=True)["estimate"]
    assert numbers["how"] == "its parts measured on this machine"
    assert numbers["run_s"] >= numbers["run_idle_s"] > numbers["step_s"] * 40 + 15
    shown = capsys.readouterr().err
    assert "the whole run" in shown
    assert "starting takes" in shown


def test_a_sweep_says_how_long_all_of_it_takes(tree: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    grid = {"optimizer.lr": [1e-3, 2e-3], "quantization.bits": [16, 4]}
    counted = sweep(build(SweepConfig, tree | {"grid": grid}), dry_run=True)
    assert counted["estimated_s"] > 20
    assert "the sweep takes" in capsys.readouterr().err
