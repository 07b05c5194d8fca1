"""What a trial reports to Ray Tune, and when it has ended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finhpc.commands.sweep import actor
from finhpc.commands.sweep.actor import EvaluationReports
from finhpc.commands.sweep.plan import plan_sweep
from finhpc.commands.sweep.trial import TrialArguments, read_outcome, write_outcome
from finhpc.runs.run import Pruned
from finhpc.settings.base import build
from finhpc.settings.pretrain import PretrainConfig
from finhpc.settings.sweep import SweepConfig
from finhpc.training.journal import WORKER_FILE, Journal


def reports_of(run: Path, steps: int, losses: dict[int, float]) -> EvaluationReports:
    run.mkdir(exist_ok=True)
    journal = Journal(run / WORKER_FILE)
    for step, loss in losses.items():
        journal.write("eval", step=step, tokens=8 * step, val_loss=loss, val_perplexity=1.0)
    journal.close()
    return EvaluationReports(run, TrialArguments(build(PretrainConfig, {}), steps, {}, {}, {}))


def test_evaluations_are_reported_once_and_the_last_is_left_to_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported: list[tuple[int, float]] = []
    monkeypatch.setattr(actor, "_report", lambda step, loss: reported.append((step, loss)))
    reports = reports_of(tmp_path / "run", 20, {5: 4.9, 10: 4.0})
    reports.send()
    reports.send({"step": 10})
    assert reported == [(5, 4.9), (10, 4.0)]
    reports_of(tmp_path / "run", 20, {15: 3.0, 20: 2.0})
    reports.send()
    assert reported[2:] == [(15, 3.0)], "a scheduler must not prune what has finished"


@pytest.mark.parametrize("ended", [False, True])
def test_a_pruned_trial_records_its_evaluation_unless_it_had_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended: bool
) -> None:
    def stop(step: int, loss: float) -> None:
        raise SystemExit(0)

    monkeypatch.setattr(actor, "_report", stop)
    run = tmp_path / "run"
    reports = reports_of(run, 20, {5: 5.0})
    if ended:
        write_outcome(run, {"status": "finished"})
    with pytest.raises(Pruned):
        reports.send()
    expected: dict[str, Any] = {"status": "pruned", "step": 5, "steps": 5, "tokens": 40, "val_loss": 5.0}
    assert read_outcome(run) == ({"status": "finished"} if ended else expected | {"val_perplexity": 1.0})


def test_a_finished_trial_goes_on_when_it_should_have_more_steps(
    run_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finhpc.commands.sweep.plan.known_resources", lambda: None)  # no times are estimated
    tree = {
        "model": {"preset": "gpt2-tiny", "layers": 2, "width": 32},
        "data": {"shards": str(run_shards), "seq_len": 32},
        "run": {"name": "ranks", "storage": str(tmp_path)},
        "grid": {"method.rank": [4]},
    }
    for steps, ended in ((6, True), (7, False)):
        plan = plan_sweep(build(SweepConfig, tree | {"train": {"steps": steps}}), tmp_path / "ranks")
        run = plan.run_folder("rank4")
        write_outcome(run, {"status": "finished"})
        (run / "result.json").write_text(json.dumps({"status": "finished", "steps": 6, "val_loss": 3.0}))
        assert plan.has_ended(plan.trials[0]) is ended
        assert read_outcome(run)["val_loss"] == 3.0, "the figures are those of the training's result"
