from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import f1_score

from finhpc.evaluation.metrics import intervals, majority, random_guess, weighted_f1, weighted_f1_of_counts

# gold 0: two right, one taken for 1; gold 1: one right, one taken for 0; gold 2: never found
GOLDS, PREDICTIONS = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 0, 0]


def test_weighted_f1_of_a_confusion_made_by_hand() -> None:
    f1 = [2 * 2 / (3 + 4), 2 * 1 / (2 + 2), 0.0]
    by_hand = (3 * f1[0] + 2 * f1[1] + 1 * f1[2]) / 6
    assert weighted_f1(list(zip(GOLDS, PREDICTIONS, strict=True))) == pytest.approx(by_hand, abs=1e-12)
    assert by_hand == pytest.approx(f1_score(GOLDS, PREDICTIONS, average="weighted", zero_division=0), abs=1e-12)


def test_resampled_f1_is_that_of_scikit_learn() -> None:
    draw = np.random.default_rng(0)
    golds, predictions = draw.integers(3, size=(2, 50))
    counts = np.zeros((1, 3, 3), np.int64)
    np.add.at(counts[0], (golds, predictions), 1)
    expected = f1_score(golds, predictions, average="weighted", zero_division=0)
    assert weighted_f1_of_counts(counts)[0] == pytest.approx(expected, abs=1e-12)


def test_intervals_repeat_and_hold_the_score() -> None:
    draw = np.random.default_rng(1)
    golds = draw.integers(3, size=300)
    predictions = np.where(draw.random(300) < 0.7, golds, 0)
    right = (golds == predictions).astype(float)
    once, again = (intervals(golds, predictions, {"acc": right}, 500, 3) for _ in range(2))
    assert once == again
    low, high = once["acc"]
    assert low < right.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * right.std() / 300**0.5, rel=0.15)


def test_baselines() -> None:
    golds = np.array([0, 0, 0, 1])
    assert majority(golds)["acc"] == 0.75
    assert majority(golds)["weighted_f1"] == pytest.approx(0.75 * 2 * 3 / 7)
    assert random_guess(golds, np.array([2, 2, 2, 2]))["acc"] == 0.5
