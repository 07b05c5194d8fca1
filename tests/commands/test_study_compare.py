"""How finals are compared: by hand-computed curves, intervals and costs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finhpc.commands.study.command import _measured_runs
from finhpc.commands.study.compare import (
    Compared,
    Costs,
    at,
    compared,
    final_rows,
    interval,
    ratio_interval,
    standard_error,
)
from finhpc.commands.study.notes import final_notes, reference_notes
from finhpc.commands.study.report import figure, page
from finhpc.commands.study.trained import Trained
from finhpc.commands.sweep.trial import Trial
from finhpc.settings.base import build
from finhpc.settings.pretrain import PretrainConfig
from finhpc.settings.sweep import StudyConfig

PER_STEP = 4 * 256  # tokens of a step with the default settings


def trained(losses: dict[int, float], variant: str = "a", seed: int = 0, lr: float = 1e-3, **more: Any) -> Trained:
    tree = {"train": {"steps": max(losses, default=1), "seed": seed}, "optimizer": {"lr": lr}}
    tree |= more.pop("tree", {})
    trial = Trial(variant, {}, PretrainConfig, tree)
    run = build(PretrainConfig, tree)
    result = {"params_total": 1, "tokens": run.train.steps * PER_STEP, "peak_memory_bytes": [3, 4]}
    return Trained(variant, trial, run, result | more.pop("result", {}), losses, **more)


def study_of(*names: str, **study: Any) -> StudyConfig:
    variants = {name: {"lr": [1e-3], "start": "dense" if name == "after" else None} for name in names}
    return build(StudyConfig, {"study": {"variants": variants, **study}})


def test_losses_between_evaluations_are_interpolated() -> None:
    falling = {10: 5.0, 20: 4.0, 30: 3.0}
    assert at(falling, 15) == pytest.approx(4.5)
    assert at(falling, 99) == 3.0


def test_times_are_steps_by_measured_seconds_and_a_start_counts() -> None:
    runs = [trained({10: 5, 20: 4, 30: 2.9 + seed / 10}, "dense", seed) for seed in (0, 2)]
    runs += [trained({10: 5, 20: 3, 30: 2.5}, "fast"), trained({10: 3, 20: 2.8, 30: 2.7}, "after")]
    seconds = {"dense": [1.0, 9.0, 1.0], "fast": [0.5], "after": [0.5]}
    costs = Costs(seconds, {"dense": 10.0, "fast": 4.0, "after": 4.0})
    dense, fast, after = final_rows(study_of("dense", "fast", "after"), runs, costs, 10 * PER_STEP)
    assert dense["val_loss"] == pytest.approx(3.0)
    assert dense["spread"] == pytest.approx(0.2)
    assert dense["time_to_reference_loss"] == dense["operations_to_reference_loss"] == 1.0
    assert dense["step_s_spread"] == 8.0, "the machine was not quiet"
    assert dense["operations"] == 300
    assert (dense["tokens"], dense["epochs"]) == (30 * PER_STEP, 3.0)
    assert dense["peak_memory_bytes"] == 7, "of both workers"
    assert fast["time_to_reference_loss"] == pytest.approx(20 * 0.5 / 30)
    assert fast["operations_to_reference_loss"] == pytest.approx(20 * 4 / 300)
    assert after["time_to_reference_loss_with_start"] == pytest.approx((30 + 10 * 0.5) / 30)
    assert fast["val_loss_at_equal_time"] == 2.5, "it ended before dense did"


def test_losses_at_equal_tokens_time_and_operations() -> None:
    """`long` takes twice the steps of dense, half a second each instead of one, and 0.8 of its operations."""
    runs = [trained({10: 5, 20: 4}, "dense"), trained({10: 5, 20: 4.5, 30: 4.2, 40: 3.6}, "long")]
    costs = Costs({"dense": [1.0], "long": [0.5]}, {"dense": 10.0, "long": 8.0})
    _, long = final_rows(study_of("dense", "long"), runs, costs, 1)
    assert long["val_loss_at_equal_tokens"] == pytest.approx(4.5), "after 20 steps"
    assert long["val_loss_at_equal_time"] == pytest.approx(3.6), "after 40"
    assert long["val_loss_at_equal_operations"] == pytest.approx(4.35), "after 25"


def test_tokens_count_and_not_steps_if_batches_differ() -> None:
    large = {"parallel": {"micro_batch_size": 8}, "train": {"steps": 20}}
    runs = [trained({10: 5, 20: 4}, "dense"), trained({10: 4.8, 20: 3.9}, "large", tree=large)]
    _, row = final_rows(
        study_of("dense", "large"), runs, Costs({"dense": [1.0], "large": [1.0]}, {"dense": 1.0, "large": 1.0}), 1
    )
    assert row["val_loss_at_equal_tokens"] == pytest.approx(4.8), "10 steps have the tokens of dense's 20"


def test_the_interval_is_students() -> None:
    low, high = interval([1.0, 2.0, 3.0]) or (0, 0)
    assert (low, high) == pytest.approx((2 - 4.30265 / math.sqrt(3), 2 + 4.30265 / math.sqrt(3)), rel=1e-5)
    assert interval([1.0]) is None
    low, high = ratio_interval([0.5, 1.0, 2.0]) or (0, 0)
    assert high == pytest.approx(math.exp(4.30265 * math.log(2) / math.sqrt(3)), rel=1e-5)
    assert low * high == pytest.approx(1.0), "twice is as far from equal as half"


def test_the_time_to_the_references_loss_is_paired_by_seed() -> None:
    """Every seed's own target: 4.0 and 4.4 for dense. `low` is there after 15 and 10 of dense's 20 steps."""
    runs = [trained({10: 5, 20: 4.0}, "dense", 0), trained({10: 5.4, 20: 4.4}, "dense", 1)]
    runs += [trained({10: 4.5, 20: 3.5}, "low", 0), trained({10: 4.4, 20: 4.1}, "low", 1)]
    _, low = final_rows(
        study_of("dense", "low"), runs, Costs({"dense": [2.0], "low": [1.0]}, {"dense": 1.0, "low": 1.0}), 1
    )
    assert low["time_to_reference_loss_seeds"] == pytest.approx([15 / 40, 10 / 40])
    assert low["time_to_reference_loss_ci95"] == pytest.approx(ratio_interval([15 / 40, 10 / 40]))


def test_there_is_no_interval_if_a_seed_never_gets_there() -> None:
    runs = [trained({10: 5, 20: 4.0}, "dense", seed) for seed in (0, 1)]
    runs += [trained({10: 4.5, 20: 3.5}, "low", 0), trained({10: 5, 20: 4.2}, "low", 1)]
    _, low = final_rows(
        study_of("dense", "low"), runs, Costs({"dense": [1.0], "low": [1.0]}, {"dense": 1.0, "low": 1.0}), 1
    )
    assert low["time_to_reference_loss_seeds"] == [pytest.approx(15 / 20), None]
    assert low["time_to_reference_loss_ci95"] is None
    assert low["time_to_reference_loss"] == pytest.approx((10 + 10 * 0.75 / 0.9) / 20), "of the mean curves"


def test_the_target_is_the_references_lowest_loss_and_the_time_at_which_it_had_it() -> None:
    runs = [trained({10: 5, 20: 4, 30: 4.5}, "dense"), trained({10: 4, 20: 3.5, 30: 3}, "low")]
    dense, low = final_rows(
        study_of("dense", "low"), runs, Costs({"dense": [1.0], "low": [1.0]}, {"dense": 1.0, "low": 1.0}), 1
    )
    assert dense["time_to_reference_loss"] == 1.0
    assert low["time_to_reference_loss"] == pytest.approx(10 / 20)


def test_final_losses_have_errors_over_samples_and_intervals_over_seeds() -> None:
    def of(variant: str, seed: int, samples: tuple[float, ...]) -> Trained:
        return trained({10: 4.0}, variant, seed, samples=samples, result={"final_val_tokens": 93})

    runs = [of("dense", 0, (4.0, 5.0, 6.0)), of("dense", 1, (4.2, 5.2, 6.2))]
    runs += [of("low", 0, (4.1, 5.3, 6.2)), of("low", 1, (4.3, 5.5, 6.4))]
    costs = Costs({"dense": [1.0], "low": [1.0]}, {"dense": 1.0, "low": 1.0})
    dense, low = final_rows(study_of("dense", "low"), runs, costs, 1)
    assert dense["final_val_loss"] == pytest.approx(5.1)
    assert dense["final_val_loss_se"] == pytest.approx(1 / math.sqrt(3)), "means over the seeds: 4.1, 5.1, 6.1"
    assert dense["difference"] == 0
    assert low["difference"] == pytest.approx((0.1 + 0.3 + 0.2 + 0.1 + 0.3 + 0.2) / 6)
    assert low["difference_se"] == pytest.approx(0.1 / math.sqrt(3)), "0.1, 0.3 and 0.2: the samples are paired"
    assert low["difference_ci95"] == pytest.approx((0.2, 0.2)), "both seeds differ by as much"
    assert low["final_val_tokens"] == 93
    assert standard_error(np.array([1.0])) is None


def test_method_3_pays_for_its_dense_weights_as_long_as_it_has_them() -> None:
    run = build(PretrainConfig, {"method": {"kind": "blend", "blend_share": 0.5}, "train": {"steps": 20}})
    costs = Costs({"m": [3.0], "m without W": [1.0]}, {"m": 5.0, "m without W": 2.0})
    assert costs.time_at(run, "m", 9) == 27, "alpha is 0 from step 10 on"
    assert costs.time_at(run, "m", 20) == 27 + 11
    assert costs.operations_at(run, "m", 20) == 9 * 5 + 11 * 2


def test_a_blend_is_measured_without_its_dense_weights_too() -> None:
    tree = {"method": {"kind": "blend"}, "model": {"path": "dense"}}
    three, guided = (trained({1: 5.0}, "three", tree=tree), trained({1: 5.0}, "guided", tree=tree | {"model": {}}))
    runs = _measured_runs([three, guided])
    kinds = {name: run.method.kind for name, run in runs.items()}
    expected = {"three": "blend", "three without W": "svd", "guided": "blend", "guided without W": "low_rank"}
    assert kinds == expected, "what is trained from scratch has no model to start from"


def reference(*ends: float) -> Compared:
    runs = [trained({100: 5.0, 400: end}, "dense", seed) for seed, end in enumerate(ends)]
    return Compared("dense", runs, Costs({"dense": [1.0]}, {"dense": 1.0}))


def test_a_reference_that_does_not_reach_its_own_earlier_loss_is_reported() -> None:
    screened = [trained({100: 4.1}, "dense"), trained({100: 3.0}, "dense", lr=2e-3), trained({100: 3.0}, "low")]
    assert reference_notes(screened, reference(4.0)) == []
    assert reference_notes(screened, reference(4.1, 4.3)) == [], "within the spread of 0.2"
    (note,) = reference_notes(screened, reference(4.5, 4.6))
    for part in ("dense does not reach", "4.100 after 102,400 tokens", "5.000 there and end at 4.550", "spread 0.100"):
        assert part in note
    shorter = [trained({800: 3.0}, "dense")]
    assert reference_notes(shorter, reference(4.5, 4.6)) == [], "the screening saw more text than the finals"


def test_notes_on_repeated_text_short_splits_and_a_busy_machine() -> None:
    row = {"variant": "dense", "epochs": 2.5, "final_val_tokens": 1_000, "step_s_spread": 0.3}
    repeated, short, busy = final_notes(study_of("dense"), [row])
    assert "dense 2.5" in repeated
    assert "1,000 tokens, which is less than study.final_tokens=1,000,000" in short
    assert "busy" in busy
    quiet = {"variant": "dense", "epochs": 1.0, "final_val_tokens": 1_000_000, "step_s_spread": 0.1}
    assert final_notes(study_of("dense"), [quiet]) == []


def test_the_page_has_the_notes_the_tables_and_the_curves(tmp_path: Path) -> None:
    runs = [
        trained({10: 5, 20: 4}, "dense", train={step: 5 - step / 20 for step in range(1, 21)}),
        trained({10: 4.5, 20: 3.5}, "low <&>", train={step: 5 - step / 20 for step in range(1, 21)}),
    ]
    settings = study_of("dense", "low <&>")
    costs = Costs({"dense": [1.0], "low <&>": [1.0]}, {"dense": 1e12, "low <&>": 1e12})
    rows = [row | {"tuning_runs": 1, "tuning_lr_edge": None} for row in final_rows(settings, runs, costs, 1)]
    drawn = figure(settings, compared(runs, costs))
    assert drawn.panels == 4
    assert drawn.png[:4] == b"\x89PNG"
    tuning = {"variant": "dense", "runs": 1, "tokens": 9, "lrs": [1e-3], "lr": 1e-3, "lr_edge": "only", "val_loss": 4.0}
    result = {"study": "s", "reference": "dense", "notes": ["mind <this>"], "finals": rows, "tuning": [tuning]}
    text = page(result | {"screening": []}, drawn)
    for part in (
        "mind &lt;this&gt;",
        "low &lt;&amp;&gt;",
        "equal operations",
        "</svg>",
        "<td>only</td>",
        "<td>4.000</td>",
    ):
        assert part in text
    assert "<script" not in text
    assert 'id="screening"' not in text
    for title in ("std error", "difference", "with start", "time, 95 %"):
        assert f"<th>{title}</th>" not in text, "nothing to show, or the time again"
    started = [row | {"time_to_reference_loss_with_start": 9.0} for row in rows]
    text = page(result | {"screening": [], "finals": started}, drawn)
    assert "<th>with start</th>" in text
    assert "with start: including the training" in text
