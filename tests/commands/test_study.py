"""A study on a real Ray: what it leaves, what it does not do twice, what it refuses."""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from finhpc.commands.study.command import best_of, finalists, study
from finhpc.commands.study.report import Trained, at, final_rows, time_at
from finhpc.commands.study.variants import SCREEN, plan_trials, trial_of
from finhpc.commands.sweep.trial import Trial, write_outcome
from finhpc.errors import ConfigError, TrainingFailedError
from finhpc.runs.folder import RunFolder
from finhpc.settings.base import build, load
from finhpc.settings.pretrain import PretrainConfig
from finhpc.settings.study import StudyConfig
from finhpc.training.journal import read
from tests.test_docs import documented


def config(shards: Path, storage: Path, **about: Any) -> StudyConfig:
    variants: dict[str, Any] = {
        "dense": {"settings": {"method": {"kind": "dense"}}, "lr": [3e-3]},
        "after": {"settings": {"method": {"kind": "svd", "rank": 8}}, "lr": [3e-3], "start": "dense"},
        "wild": {"settings": {"method": {"rank": 4}, "optimizer": {"warmup_steps": 0, "grad_clip": 0}}, "lr": [1e30]},
    }
    tree: dict[str, Any] = {
        "model": {"preset": "gpt2-tiny", "layers": 2, "width": 32, "context": 64},
        "data": {"shards": str(shards), "seq_len": 32, "eval_samples": 8},
        "optimizer": {"warmup_steps": 2},
        "train": {"steps": 9, "eval_every": 3, "checkpoint_every": 0},
        "run": {"name": "s", "storage": str(storage), "experiment": "s"},
        "study": {"variants": variants, "screen_steps": 3, "finalists": 1, "seeds": [0], "pace_steps": 2} | about,
    }
    return build(StudyConfig, tree)


def starts(storage: Path, name: str) -> int:
    return sum(record["kind"] == "start" for record in read(storage / name / "journal.jsonl")[0])


def test_a_dry_run_has_the_documented_keys(run_shards: Path, tmp_path: Path) -> None:
    planned = study(config(run_shards, tmp_path), dry_run=True)
    assert planned.keys() - {"status"} == documented("study")
    assert [row["variant"] for row in planned["variants"]] == ["dense", "after", "wild"]
    assert planned["final_tokens"] == 9 * PretrainConfig.model_validate({}).parallel.samples_per_step * 32


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_study_goes_on_where_it_stopped_and_leaves_table_and_curves(run_shards: Path, tmp_path: Path) -> None:
    settings = config(run_shards, tmp_path)
    last = tmp_path / "s-final-after-lr0.003-s0"
    last.mkdir()
    (last / "result.json").write_text("{")
    with pytest.raises(TrainingFailedError, match=rf"{last.name} failed: .*result.json is not valid JSON"):
        study(settings)
    (last / "result.json").unlink()
    done = ["s-screen-dense-lr0.003-s0", "s-screen-after-lr0.003-s0", "s-final-dense-lr0.003-s0"]
    before = {name: (tmp_path / name / "journal.jsonl").read_bytes() for name in done}
    result = study(settings)
    for name in done:
        assert (tmp_path / name / "journal.jsonl").read_bytes() == before[name], "a finished run is not trained again"
        assert starts(tmp_path, name) == 1
    assert starts(tmp_path, last.name) == 1

    assert json.loads((tmp_path / "s" / "result.json").read_text()) == result
    screening = {row["variant"]: row["val_loss"] for row in result["screening"]}
    assert screening["wild"] is None, "it diverged, and the study went on"
    rows = {row["variant"]: row for row in result["finals"]}
    assert set(rows) == {"dense", "after"}
    for name, row in rows.items():
        final = json.loads((tmp_path / f"s-final-{name}-lr0.003-s0" / "result.json").read_text())
        assert row["val_loss"] == final["val_loss"] < screening[name]
        assert row["tokens"] == 9 * 4 * 32
        assert row["step_s"] == statistics.median(result["step_s"][name]) > 0
    assert rows["dense"]["time_to_reference_loss"] == pytest.approx(1)
    begun = yaml.safe_load((tmp_path / last.name / "config.yaml").read_text())["model"]
    assert begun["path"] == str(tmp_path / done[2] / "model"), "from the dense model of the same seed"
    with open(tmp_path / "s" / "table.csv", encoding="utf-8") as file:
        assert [row["variant"] for row in csv.DictReader(file)] == ["dense", "after"]
    assert (tmp_path / "s" / "curves.png").read_bytes()[:4] == b"\x89PNG"
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("s")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 5
    assert {run.data.params["model"] for run in runs} == {"gpt2-tiny"}, "the start of a variant is none of its settings"


def curve(losses: dict[int, float], variant: str = "a", seed: int = 0, lr: float = 1e-3) -> Trained:
    tree = {"train": {"steps": max(losses, default=1), "seed": seed}, "optimizer": {"lr": lr}}
    trial = Trial(variant, {}, PretrainConfig, tree)
    return Trained(variant, trial, build(PretrainConfig, tree), {"params_total": 1, "tokens": 10}, losses)


def test_losses_between_evaluations_are_interpolated() -> None:
    falling = {10: 5.0, 20: 4.0, 30: 3.0}
    assert at(falling, 15) == pytest.approx(4.5)
    assert at(falling, 99) == 3.0


def test_times_are_steps_by_measured_seconds_and_a_start_counts() -> None:
    variants = {"dense": {"lr": [1e-3]}, "fast": {"lr": [1e-3]}, "after": {"lr": [1e-3], "start": "dense"}}
    settings = build(StudyConfig, {"study": {"variants": variants}})
    runs = [curve({10: 5, 20: 4, 30: 2.9 + seed / 10}, "dense", seed) for seed in (0, 2)]
    runs += [curve({10: 5, 20: 3, 30: 2.5}, "fast"), curve({10: 3, 20: 2.8, 30: 2.7}, "after")]
    seconds = {"dense": [1.0, 9.0, 1.0], "fast": [0.5], "after": [0.5]}
    dense, fast, after = final_rows(settings, runs, seconds)
    assert dense["val_loss"] == pytest.approx(3.0)
    assert dense["spread"] == pytest.approx(0.2)
    assert dense["time_to_reference_loss"] == 1.0
    assert dense["step_s_spread"] == 8.0, "the machine was not quiet"
    assert fast["time_to_reference_loss"] == pytest.approx(20 * 0.5 / 30)
    assert after["time_to_reference_loss_with_start"] == pytest.approx((30 + 10 * 0.5) / 30)
    assert fast["val_loss_at_equal_time"] == 2.5, "it ended before dense did"


def test_method_3_pays_for_its_dense_weights_as_long_as_it_has_them() -> None:
    run = build(PretrainConfig, {"method": {"kind": "blend", "blend_share": 0.5}, "train": {"steps": 20}})
    seconds = {"m": [3.0], "m without W": [1.0]}
    assert time_at(run, seconds, "m", 9) == 27, "alpha is 0 from step 10 on"
    assert time_at(run, seconds, "m", 20) == 27 + 11


def test_the_best_go_on_at_their_best_learning_rate_with_the_reference() -> None:
    variants = {name: {"lr": [1e-3, 2e-3]} for name in ("dense", "a", "b", "c")}
    settings = build(StudyConfig, {"study": {"variants": variants, "finalists": 2}})
    ends = {"dense": (6.0, 5.0), "a": (4.0, 4.5), "b": (4.4, 4.2), "c": (4.9, None)}
    screened = [
        curve({} if loss is None else {9: loss}, name, lr=lr)
        for name, losses in ends.items()
        for lr, loss in zip((1e-3, 2e-3), losses, strict=True)
    ]
    assert finalists(settings, screened) == {"dense": 2e-3, "a": 1e-3, "b": 2e-3}
    assert best_of(screened)["c"].lr == 1e-3


def test_every_problem_of_a_study_is_named_at_once(run_shards: Path, tmp_path: Path) -> None:
    variants: dict[str, Any] = {
        "low": {"settings": {"method": {"rank": 900}}, "lr": [1e-3]},
        "odd": {"settings": {"method": {"knid": "cola"}}, "lr": [1e-3, 2e-3], "start": "nobody"},
    }
    with pytest.raises(ConfigError) as caught:
        study(config(run_shards, tmp_path, variants=variants))
    text = str(caught.value)
    for part in ("study.reference=dense", "unequal numbers", "start=nobody", "low: method.rank=900", "method.knid"):
        assert part in text
    assert not list(tmp_path.iterdir())


def test_a_run_that_ended_with_other_settings_is_refused(run_shards: Path, tmp_path: Path) -> None:
    settings = config(run_shards, tmp_path)
    trial = trial_of(settings, SCREEN, "dense", 3e-3, 0)
    plan = plan_trials(settings, [trial])
    folder = RunFolder(tmp_path, trial.name)
    write_outcome(folder.path, {"status": "diverged", "error": "."})
    folder.write_config(plan.config_of(trial), "data", None)
    plan_trials(settings, [trial])
    settings.data.eval_samples = 4
    with pytest.raises(ConfigError, match=r"data\.eval_samples was 8 in the run's config, now 4"):
        plan_trials(settings, [trial_of(settings, SCREEN, "dense", 3e-3, 0)])


@pytest.mark.parametrize("name", ["quality", "quality-start", "figure6"])
def test_the_studies_that_ship_are_whole(name: str) -> None:
    settings = load(StudyConfig, f"studies/{name}")
    names = [
        trial_of(settings, SCREEN, variant, lr, 0).name
        for variant, about in settings.study.variants.items()
        for lr in about.lr
    ]
    assert len(set(names)) == len(names) >= 4
    assert len({len(about.lr) for about in settings.study.variants.values()}) == 1
