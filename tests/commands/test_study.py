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

from finhpc.commands.study.command import study
from finhpc.commands.study.compare import interval
from finhpc.commands.study.variants import SCREEN, plan_trials, trial_of
from finhpc.commands.sweep.trial import write_outcome
from finhpc.data.shards.shards import Shards
from finhpc.errors import ConfigError, TrainingFailedError
from finhpc.runs.folder import RunFolder
from finhpc.settings.base import build, load
from finhpc.settings.pretrain import PretrainConfig
from finhpc.settings.sweep import StudyConfig
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


def operations_of(settings: StudyConfig, name: str) -> float:
    """Operations of a step of 4 samples of 32 tokens, 2 layers x 32 wide: 6 per weight and token, and attention's."""
    shapes = {"c_attn": (32, 96), "c_proj": (32, 32), "c_fc": (32, 128), "mlp": (128, 32)}
    weights = sum(a * b if name == "dense" else 8 * (a + b) for a, b in shapes.values())
    vocab = Shards.open(str(settings.data.shards)).manifest.vocab_size
    head = 32 * vocab if name == "dense" else 8 * (32 + vocab)
    return 4 * 32 * (6 * (2 * weights + head) + 2 * 3 * 2 * 32 * 32)


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
        assert row["final_val_loss"] == final["final_val_loss"]
        assert row["final_val_loss_se"] == pytest.approx(final["final_val_loss_se"])
        assert row["final_val_tokens"] == 32 * 31, "the whole split"
        assert row["epochs"] == 9 * 4 * 32 / (96 * 64)
        assert row["peak_memory_bytes"] == sum(final["peak_memory_bytes"])
        assert row["operations"] == 9 * operations_of(settings, name)
        assert row["step_s"] == statistics.median(result["step_s"][name]) > 0
    assert rows["dense"]["time_to_reference_loss"] == pytest.approx(1)
    begun = yaml.safe_load((tmp_path / last.name / "config.yaml").read_text())["model"]
    assert begun["path"] == str(tmp_path / done[2] / "model"), "from the dense model of the same seed"
    with open(tmp_path / "s" / "table.csv", encoding="utf-8") as file:
        assert [row["variant"] for row in csv.DictReader(file)] == ["dense", "after"]
    assert (tmp_path / "s" / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert "less than study.final_tokens" in (tmp_path / "s" / "report.html").read_text()
    assert sum("is the only one tried" in note for note in result["notes"]) == 2, "of the finalists and not of wild"
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("s")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 5
    assert {run.data.params["model"] for run in runs} == {"gpt2-tiny"}, "the start of a variant is none of its settings"


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_grid_widens_and_the_finals_of_several_seeds_are_compared(run_shards: Path, tmp_path: Path) -> None:
    """With so few steps, the higher a rate the better: both grids end at their highest."""
    low_rank = {"method": {"kind": "low_rank", "rank": 8}}
    variants: dict[str, Any] = {
        "dense": {"settings": {"method": {"kind": "dense"}}, "lr": [1e-4, 2e-4]},
        "low": {"settings": low_rank, "lr": [1e-4, 2e-4]},
    }
    settings = config(run_shards, tmp_path, variants=variants, widen=1, seeds=[0, 1], final_tokens=310)
    result = study(settings)
    tried = [1e-4, 2e-4, 4e-4]
    for row in result["tuning"]:
        assert (row["runs"], row["tokens"], row["lrs"]) == (3, 3 * 3 * 4 * 32, tried)
        assert (row["lr"], row["lr_edge"]) == (4e-4, "highest")
        losses = {r["lr"]: r["val_loss"] for r in result["screening"] if r["variant"] == row["variant"]}
        assert row["val_loss"] == min(losses.values()) == losses[4e-4]
    assert sum("is the highest of the 3 tried" in note for note in result["notes"]) == 2
    dense, low = result["finals"]
    for row in (dense, low):
        assert (row["tuning_runs"], row["tuning_tokens"], row["tuning_lr_edge"]) == (3, 3 * 3 * 4 * 32, "highest")
    assert (dense["lr"], low["lr"], low["seeds"], low["final_val_tokens"]) == (4e-4, 4e-4, 2, 310)
    finals = {
        name: [json.loads((tmp_path / f"s-final-{name}-lr0.0004-s{i}" / "result.json").read_text()) for i in (0, 1)]
        for name in ("dense", "low")
    }
    for row, name in ((dense, "dense"), (low, "low")):
        assert row["val_loss"] == pytest.approx(statistics.fmean(one["val_loss"] for one in finals[name]))
        assert row["final_val_loss"] == pytest.approx(statistics.fmean(one["final_val_loss"] for one in finals[name]))
    pairs = zip(finals["low"], finals["dense"], strict=True)
    differences = [one["final_val_loss"] - other["final_val_loss"] for one, other in pairs]
    assert low["difference"] == pytest.approx(statistics.fmean(differences), abs=1e-9)
    assert low["difference_ci95"] == pytest.approx(interval(differences), abs=1e-9)
    journals = {path: path.read_bytes() for path in tmp_path.glob("s-*/journal.jsonl")}
    assert len(journals) == 6 + 4
    again = study(settings)
    assert {path: path.read_bytes() for path in tmp_path.glob("s-*/journal.jsonl")} == journals
    assert (again["tuning"], again["screening"]) == (result["tuning"], result["screening"])


def test_every_problem_of_a_study_is_named_at_once(run_shards: Path, tmp_path: Path) -> None:
    variants: dict[str, Any] = {
        "low": {"settings": {"method": {"rank": 900}}, "lr": [1e-3]},
        "twice": {"settings": {"data": {"seq_len": 16}}, "lr": [1e-3, 0.001, -1.0]},
        "odd": {"settings": {"method": {"knid": "cola"}}, "lr": [1e-3, 2e-3], "start": "nobody"},
    }
    with pytest.raises(ConfigError) as caught:
        study(config(run_shards, tmp_path, variants=variants))
    text = str(caught.value)
    for part in ("study.reference=dense", "unequal numbers", "start=nobody", "low: method.rank=900", "method.knid"):
        assert part in text
    for part in ("twice: lr has 0.001 twice", "twice: lr has -1; learning rates", "twice: settings.data would score"):
        assert part in text
    assert not list(tmp_path.iterdir())


def test_a_missing_compiler_is_reported_at_the_dry_run(
    run_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    settings = config(run_shards, tmp_path)
    settings.train.compile = "on"
    with pytest.raises(ConfigError, match=r"study\.variants\.dense: train\.compile=on needs a C\+\+ compiler"):
        study(settings, dry_run=True)


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


@pytest.mark.parametrize("name", ["methods", "baselines", "quality", "quality-start", "figure6"])
def test_the_studies_that_ship_are_whole(name: str) -> None:
    settings = load(StudyConfig, f"studies/{name}")
    names = [
        trial_of(settings, SCREEN, variant, lr, 0).name
        for variant, about in settings.study.variants.items()
        for lr in about.lr
    ]
    assert len(set(names)) == len(names) >= 4
    assert len({len(about.lr) for about in settings.study.variants.values()}) == 1
