"""The screening of a study: which rates are tried next, until when, and what the table says of it."""

from __future__ import annotations

import math
from typing import Any

import pytest

from finhpc.commands.study import screening
from finhpc.commands.study.notes import edge_notes
from finhpc.commands.study.screening import best_of, edge_of, finalists, next_rate, screen, tuning_rows
from finhpc.commands.study.trained import Trained
from finhpc.commands.study.variants import SCREEN, trial_of
from finhpc.commands.sweep.trial import Trial
from finhpc.settings.base import build
from finhpc.settings.pretrain import PretrainConfig
from finhpc.settings.sweep import StudyConfig

INF = math.inf


@pytest.mark.parametrize(
    ("rates", "edge", "following"),
    [
        ({1e-3: 5.0, 2e-3: 4.0}, "highest", 4e-3),
        ({1e-3: 4.0, 2e-3: 5.0, 4e-3: 6.0}, "lowest", 5e-4),
        ({1e-3: 5.0, 2e-3: 4.5, 8e-3: 4.0}, "highest", 3.2e-2),  # the ratio of the last step is 4
        ({1e-3: 5.0, 2e-3: 4.0, 4e-3: 4.2}, None, 2.82843e-3),  # the better neighbor
        ({1e-3: 4.1, 2e-3: 4.0, 4e-3: 4.2}, None, 1.41421e-3),
        ({1e-3: 5.0, 1.41421e-3: 4.1, 2e-3: 4.0, 4e-3: 4.2}, None, 2.82843e-3),  # the wider gap
        ({1e-3: 4.0, 2e-3: INF}, "lowest", 5e-4),
        ({1e-3: 5.0, 2e-3: 4.0, 4e-3: INF}, None, 1.41421e-3),
        ({1e-3: INF, 2e-3: INF}, "lowest", 5e-4),
    ],
)
def test_the_next_rate_is_beyond_an_edge_or_next_to_the_best(
    rates: dict[float, float], edge: str | None, following: float
) -> None:
    assert edge_of(rates) == edge
    assert next_rate(rates) == pytest.approx(following, rel=1e-9)


def test_a_single_rate_is_an_edge() -> None:
    assert edge_of({1e-3: 4.0}) == "only"


class Runs:
    """In the place of training: a loss that is a parabola in the logarithm of the rate, lowest at `optimum`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, optimum: dict[str, float], diverges: float = INF) -> None:
        self.optimum, self.diverges = optimum, diverges
        self.asked: list[tuple[str, float, str | None]] = []
        monkeypatch.setattr(screening, "train", self.train)

    def train(self, config: StudyConfig, named: list[tuple[str, Trial]]) -> list[Trained]:
        done = []
        for name, trial in named:
            run = trial.config()
            assert isinstance(run, PretrainConfig)
            lr = run.optimizer.lr
            loss = 4 + math.log2(lr / self.optimum[name]) ** 2
            self.asked.append((name, lr, trial.start))
            done.append(Trained(name, trial, run, {}, {} if lr > self.diverges else {run.train.steps: loss}))
        return done

    def rates(self, name: str) -> list[float]:
        return [lr for variant, lr, _ in self.asked if variant == name]


def config(widen: int, grids: dict[str, list[float]], **starts: str) -> StudyConfig:
    variants = {name: {"lr": lrs, "start": starts.get(name)} for name, lrs in grids.items()}
    study: dict[str, Any] = {"variants": variants, "widen": widen, "screen_steps": 10}
    return build(StudyConfig, {"study": study, "parallel": {"micro_batch_size": 2}, "data": {"seq_len": 16}})


def test_grids_widen_until_every_best_is_inside_and_all_variants_have_as_many_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs = Runs(monkeypatch, {"dense": 1.1e-3, "low": 9e-3})
    settings = config(5, {"dense": [5e-4, 1e-3, 2e-3], "low": [5e-4, 1e-3, 2e-3]})
    screened = screen(settings)
    assert runs.rates("low") == [5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2], "8e-3 is best, with worse ones on both sides"
    assert runs.rates("dense") == [5e-4, 1e-3, 2e-3, 1.41421e-3, 7.07107e-4, 1.18921e-3]
    dense, low = tuning_rows(settings, screened)
    assert (dense["runs"], dense["tokens"]) == (low["runs"], low["tokens"]) == (6, 6 * 10 * 2 * 16)
    assert (low["lr"], low["lr_edge"], dense["lr"], dense["lr_edge"]) == (8e-3, None, 1.18921e-3, None)
    assert edge_notes([dense, low]) == []
    assert finalists(settings, screened) == {"dense": 1.18921e-3, "low": 8e-3}


def test_the_limit_ends_it_and_the_edge_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs(monkeypatch, {"dense": 1.1e-3, "low": 1.0})
    settings = config(2, {"dense": [1e-3, 2e-3], "low": [1e-3, 2e-3]})
    screened = screen(settings)
    assert runs.rates("low") == [1e-3, 2e-3, 4e-3, 8e-3]
    assert runs.rates("dense") == [1e-3, 2e-3, 5e-4, 1.41421e-3], "below the edge first, then between"
    rows = tuning_rows(settings, screened)
    assert [row["lr_edge"] for row in rows] == [None, "highest"]
    (note,) = edge_notes(rows)
    assert note.startswith("low: its best lr 0.008 is the highest of the 4 tried; a higher one may be better")


def test_a_diverged_rate_is_an_end_of_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs(monkeypatch, {"dense": 1e-2, "low": 1e-2}, diverges=3e-3)
    screen(config(4, {"dense": [1e-3, 2e-3], "low": [1e-3, 2e-3]}))
    assert runs.rates("low") == [1e-3, 2e-3, 4e-3], "2e-3 is inside, since 4e-3 diverged"


def test_a_variant_that_always_diverges_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs(monkeypatch, {"dense": 1e-3, "low": 1e-3}, diverges=2e-5)
    settings = config(1, {"dense": [1e-3, 2e-3], "low": [1e-5, 2e-5]})
    rows = tuning_rows(settings, screen(settings))
    assert runs.rates("dense") == [1e-3, 2e-3, 5e-4], "lower ones are tried"
    assert (rows[0]["lr"], rows[0]["val_loss"]) == (None, None)
    assert edge_notes(rows[:1]) == ["dense diverged at every rate tried: 0.0005, 0.001, 0.002."]


def test_nothing_is_added_if_the_best_are_inside_or_it_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = [5e-4, 1e-3, 2e-3]
    inside = Runs(monkeypatch, {"dense": 1e-3, "low": 1e-3})
    screen(config(3, {"dense": grid, "low": grid}))
    assert len(inside.asked) == 6
    off = Runs(monkeypatch, {"dense": 1.0, "low": 1.0})
    screen(config(0, {"dense": grid, "low": grid}))
    assert len(off.asked) == 6


def test_variants_with_a_start_have_as_many_runs_and_one_start(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs(monkeypatch, {"dense": 2e-3, "after": 2e-4, "low": 1e-3})
    grid = [1e-3, 2e-3, 4e-3]
    settings = config(4, {"dense": grid, "after": grid, "low": [5e-4, 1e-3, 2e-3]}, after="dense")
    screened = screen(settings)
    assert runs.rates("after") == [1e-3, 2e-3, 4e-3, 5e-4, 2.5e-4, 1.25e-4]
    assert {start for name, _, start in runs.asked if name == "after"} == {"pretrain-screen-dense-lr0.002-s0"}
    assert {row["runs"] for row in tuning_rows(settings, screened)} == {6}


def test_the_same_losses_ask_for_the_same_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """So a study that was stopped goes on: its ended runs are only read."""
    grids = {"dense": [1e-3, 2e-3], "low": [1e-3, 2e-3]}
    asked = []
    for _ in range(2):
        runs = Runs(monkeypatch, {"dense": 3e-3, "low": 1e-4})
        screen(config(3, grids))
        asked.append(runs.asked)
    assert asked[0] == asked[1]


def test_without_a_choice_nothing_is_screened_and_the_single_rate_is_reported() -> None:
    settings = build(StudyConfig, {"study": {"finalists": 0, "variants": {"dense": {"lr": [1e-3]}}}})
    assert screen(settings) == []
    rows = tuning_rows(settings, [])
    assert (rows[0]["runs"], rows[0]["lr"], rows[0]["lr_edge"]) == (0, 1e-3, "only")
    assert edge_notes(rows) == ["dense: lr 0.001 is the only one tried; another one may be better."]


def test_the_best_go_on_at_their_best_learning_rate_with_the_reference() -> None:
    settings = config(0, {name: [1e-3, 2e-3] for name in ("dense", "a", "b", "c")})
    ends = {"dense": (6.0, 5.0), "a": (4.0, 4.5), "b": (4.4, 4.2), "c": (4.9, None)}
    screened = []
    for name, losses in ends.items():
        for lr, loss in zip((1e-3, 2e-3), losses, strict=True):
            trial = trial_of(settings, SCREEN, name, lr, 0)
            run = trial.config()
            assert isinstance(run, PretrainConfig)
            screened.append(Trained(name, trial, run, {}, {} if loss is None else {10: loss}))
    assert finalists(settings, screened) == {"dense": 2e-3, "a": 1e-3, "b": 2e-3}
    assert best_of(screened)["c"].lr == 1e-3
