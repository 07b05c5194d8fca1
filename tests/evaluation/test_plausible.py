"""Which figures count as results and which no sound model can have."""

from __future__ import annotations

import math
from typing import Any

import pytest

from finhpc.errors import ImplausibleError
from finhpc.evaluation.plausible import Bound, after_training, any_model, at_fewer_bits, check

EVEN = math.log(300)


@pytest.mark.parametrize(
    "figures",
    [
        {"val_loss": math.nan},
        {"val_loss": math.inf},
        {"tokens_per_s": -1.0},
        {"val_loss": -0.01},
        {"wall_s": -0.1},
        {"peak_memory_bytes": [5, -1]},
        {"acc": 1.2},
        {"scores": {"fpb": {"weighted_f1": 1.01}}},
        {"held_out_weighted_f1": math.nan},
        {"ci95": {"acc": [0.2, 1.5]}},
        {"pipeline_utilization": 1.3},
        {"data_wait_fraction": 7.0},
        {"val_perplexity": 0.2},
        {"models": [{"scores": {"f1": 2.0}}]},
        {"val_loss": EVEN + 1.01},
        {"val_loss": 238_831.0},
        {"loss": 60.0},
    ],
)
def test_what_cannot_be_is_refused_with_its_name_and_value(figures: dict[str, Any]) -> None:
    with pytest.raises(ImplausibleError, match=r"the model: .*=.*[Ww]hat to do: begin again\.") as caught:
        check("the model", figures, after_training(300, None), "begin again")
    assert caught.value.exit_code == 1


def test_what_can_be_passes() -> None:
    figures = {
        "val_loss": EVEN + 0.9, "val_perplexity": math.exp(EVEN + 0.9), "acc": 1.0, "weighted_f1": 0.0, "steps": 0,
        "pipeline_utilization": 1.01, "peak_memory_bytes": [None, 3], "sample": "-1", "resumed_from_step": None,
        "registered": True, "mcc": -0.2, "random": {"perplexity": 300.0}, "ci95": None,
    }  # fmt: skip
    check("the model", figures, after_training(300, None))
    check("what is known by heart", {"val_loss": -2e-6, "train_loss": -1e-7, "val_perplexity": 1 - 2e-6})


@pytest.mark.parametrize(
    ("bound", "fits", "too_much"),
    [
        (after_training(300, EVEN), 5.0, 7.0),
        (after_training(300, 20.0), 20.5, 21.1),  # it began as a bad model, and became not much worse
        (after_training(300, 238_831.0), 6.0, 230_000.0),  # it began as garbage, and nothing is learned from that
        (at_fewer_bits(8, 300, 3.0), 3.4, 4.1),
        (at_fewer_bits(8, 300, 3.0), 2.9, 1.9),  # rounding makes no model better by a nat
        (at_fewer_bits(4, 300, 3.0), 6.5, 6.8),
        (at_fewer_bits(4, 300, 3.0), 2.9, 0.0),
        (at_fewer_bits(4, 300, 8.0), 8.9, 9.1),
        (at_fewer_bits(8, 300, None), 6.6, 6.8),
        (any_model(300), 40.0, 58.0),
    ],
)
def test_a_loss_is_judged_by_what_was_scored(bound: Bound, fits: float, too_much: float) -> None:
    check("the model", {"val_loss": fits}, bound)
    with pytest.raises(ImplausibleError, match=f"val_loss={too_much:.6g}".replace("+", r"\+")):
        check("the model", {"val_loss": too_much}, bound)
