"""A sweep through Ray Tune: trials trained and scored, nested in MLflow, resumed, ranked."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from finhpc.commands.pretrain import pretrain
from finhpc.commands.report.runs import collect
from finhpc.commands.report.store import all_runs, chosen_experiments
from finhpc.commands.report.tables import _with_start
from finhpc.commands.sweep.command import sweep
from finhpc.commands.sweep.plan import plan_sweep
from finhpc.errors import ConfigError, RunBusyError
from finhpc.runs.folder import RunFolder
from finhpc.settings.base import build
from finhpc.settings.pretrain import PretrainConfig
from finhpc.settings.sweep import SweepConfig
from finhpc.tracking.describe import short_name
from finhpc.tracking.tags import SCORED_FROM
from finhpc.training.journal import read
from tests.tiny import pretrain_tree

pytestmark = pytest.mark.usefixtures("ray_cluster")


def tree(shards: Path, storage: Path) -> dict[str, Any]:
    train = {"steps": 20, "eval_every": 5, "checkpoint_every": 0}
    return pretrain_tree(shards, storage, train=train, run={"name": "ranks"}, sweep={"concurrent": 2})


def starts(folder: Path) -> int:
    """How often a trial was begun."""
    return sum(record["kind"] == "start" for record in read(folder / "journal.jsonl")[0])


def test_a_sweep_trains_scores_nests_ranks_and_resumes(
    run_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = {"method.rank": [4, 8], "optimizer.lr": [1e-3, 1e30], "quantization.bits": [16, 4]}
    base = tree(run_shards, tmp_path)
    base["optimizer"] = {"grad_clip": 0, "warmup_steps": 0}
    monkeypatch.chdir(run_shards.parent)
    base["data"]["shards"] = run_shards.name  # trials run in working directories of their own
    config = build(SweepConfig, base | {"grid": grid})
    least = sweep(config, dry_run=True)["disk_bytes"]
    result = sweep(config)

    kept = [*tmp_path.glob("ranks/trials/*/*/*.safetensors"), *tmp_path.glob("ranks/trials/*/checkpoints/*/*")]
    assert 0.8 < least / 2 / sum(file.stat().st_size for file in kept) < 1.05, "two of four diverge and leave nothing"
    rows = {row["trial"]: row for row in result["trials"]}
    assert (result["status"], result["trained"], result["scored"], len(rows)) == ("finished", 4, 8, 8)
    good = [row for row in result["trials"] if row["place"]]
    assert [row["place"] for row in good] == [1, 2, 3, 4]
    assert [row["val_loss"] for row in good] == sorted(row["val_loss"] for row in good)
    bad = [row for row in result["trials"] if row["values"]["optimizer.lr"] == 1e30]
    assert all(row["status"] == "diverged" and "is not finite" in row["error"] for row in bad)
    assert result["best"] == result["trials"][0]
    assert result["steps_trained"] >= 40
    rounded, plain = rows["rank8-lr0.001-4bit"], rows["rank8-lr0.001"]
    assert rounded["val_loss"] != plain["val_loss"]
    assert rounded["size_bytes"] == sum(file.stat().st_size for file in Path(rounded["model"]).glob("*.safetensors"))

    # The training in Tune's actor is the training of `pretrain`, bit by bit.
    alone = tree(run_shards, tmp_path / "alone")
    del alone["sweep"]
    alone["optimizer"] = base["optimizer"] | {"lr": 1e-3}
    assert pretrain(build(PretrainConfig, alone))["val_loss"] == plain["val_loss"]

    client = MlflowClient(result["tracking_uri"])
    (experiment,) = [found for found in client.search_experiments() if found.name == "finhpc"]
    runs = {run.info.run_id: run for run in client.search_runs([experiment.experiment_id])}
    parent = runs.pop(result["mlflow_run_id"])
    assert parent.data.metrics["val_loss"] == result["best"]["val_loss"]
    assert len(runs) == 6, "the two good trials at 16 and 4 bits, the two that diverged"
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {parent.info.run_id}
    assert sorted(run.info.status for run in runs.values()) == ["FAILED"] * 2 + ["FINISHED"] * 4
    child = runs[rounded["mlflow_run_id"]]
    assert (child.data.params["method.rank"], child.data.params["quantization.bits"]) == ("8", "4")
    assert child.data.metrics["val_loss"] == rounded["val_loss"]
    assert child.data.metrics["size_bytes"] == rounded["size_bytes"]
    trained = runs[plain["mlflow_run_id"]]
    own = {"score_s", "lr", "grad_norm", "step_s", "samples_per_s"}  # of a scoring, and of each step
    assert {key for key in trained.data.metrics.keys() ^ child.data.metrics.keys() if "/" not in key} <= own
    assert {next(iter(run.data.metrics)) for run in (trained, child)} == {"val_loss"}
    assert not {"concurrent", "disk_bytes", "ended_before"} & set(parent.data.metrics)
    assert [logged.dataset.name for logged in parent.inputs.dataset_inputs] == [short_name(str(run_shards))]
    assert child.data.tags[SCORED_FROM] == plain["mlflow_run_id"]
    version = client.get_model_version_by_alias("ranks", "best")
    assert version.run_id == result["best"]["mlflow_run_id"]

    with open(tmp_path / "ranks" / "trials.csv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["trial"] for row in table] == [row["trial"] for row in result["trials"]]
    assert "trained" not in table[0], "a number of trainings in result.json"
    assert {row["scored_only"] for row in table if row["quantization.bits"] == "16"} == {"False"}
    assert table[0]["method.rank"] == str(result["best"]["values"]["method.rank"])

    # The same command trains nothing again; a wider grid adds its own trials alone.
    wider = build(SweepConfig, base | {"grid": grid | {"method.rank": [4, 8, 12], "optimizer.lr": [1e-3]}})
    again = sweep(wider)
    assert (again["ended_before"], again["trained"]) == (2, 3)
    assert starts(tmp_path / "ranks" / "trials" / "rank8-lr0.001") == 1
    assert again["mlflow_run_id"] == result["mlflow_run_id"]
    assert len(client.search_runs([experiment.experiment_id])) == 9
    assert {row["trial"]: row["val_loss"] for row in again["trials"]}["rank8-lr0.001"] == plain["val_loss"]

    changed = build(SweepConfig, base | {"grid": grid, "train": base["train"] | {"seed": 1}})
    with pytest.raises(ConfigError, match=r"train\.seed was 0 in the run's config, now 1"):
        sweep(changed)


def test_asha_ends_what_falls_behind(run_shards: Path, tmp_path: Path) -> None:
    base = tree(run_shards, tmp_path)
    base["sweep"] |= {"scheduler": "asha", "scheduler_options": {"grace_period": 5, "reduction_factor": 2}}
    base["sweep"]["concurrent"] = 1
    result = sweep(build(SweepConfig, base | {"grid": {"optimizer.lr": [1e-2, 1e-5, 2e-5]}}))
    status = {row["trial"]: (row["status"], row["steps"]) for row in result["trials"]}
    assert status == {"lr0.01": ("finished", 20), "lr1e-05": ("pruned", 5), "lr2e-05": ("pruned", 5)}
    assert result["steps_trained"] == 30
    client = MlflowClient(result["tracking_uri"])
    killed = json.loads((tmp_path / "ranks" / "trials" / "lr1e-05" / "mlflow.json").read_text())["run_id"]
    assert client.get_run(killed).info.status == "KILLED"


def test_methods_that_start_from_a_dense_model_share_it(run_shards: Path, tmp_path: Path) -> None:
    base = tree(run_shards, tmp_path) | {"grid": {"method.kind": ["low_rank", "svd"], "train.seed": [0, 1]}}
    result = sweep(build(SweepConfig, base))
    loss = {row["trial"]: row["val_loss"] for row in result["trials"]}
    assert loss["kind-svd-seed0"] < loss["kind-low_rank-seed0"], "it goes on from the trained dense model"
    client = MlflowClient(result["tracking_uri"])
    runs = [client.get_run(row["mlflow_run_id"]) for row in result["trials"]]
    keys = {key for run in runs for key in run.data.params}
    assert {key for key in keys if len({run.data.params.get(key) for run in runs}) > 1} == {"method.kind", "train.seed"}
    found = collect(client, all_runs(client, chosen_experiments(client, [])))
    hours = {run.name: run.metrics["worker_hours"] for run in found.pretrained}
    svd = next(run for run in found.pretrained if run.name == "kind-svd-seed0")
    assert _with_start(found, svd) == pytest.approx(hours["kind-svd-seed0"] + hours["dense-reference"])
    shared = tmp_path / "ranks" / "shared"
    assert starts(shared / "dense-reference") == 1
    assert len(list(shared.glob("decomposed-*"))) == 1, "two seeds, one factorisation"
    trials = tmp_path / "ranks" / "trials"
    assert (trials / "kind-svd-seed0" / "decomposed").resolve() == (trials / "kind-svd-seed1" / "decomposed").resolve()


def test_each_trial_has_the_cpus_that_it_asks_for(run_shards: Path, tmp_path: Path) -> None:
    config = build(SweepConfig, tree(run_shards, tmp_path) | {"grid": {"resources.cpus_per_worker": [1, 3]}})
    plan = plan_sweep(config, tmp_path / "ranks")
    wanted = [reservation.bundles for reservation in plan.reservations().values()]
    assert wanted == [[{"CPU": 1.0}], [{"CPU": 3.0}]]
    assert plan.concurrent == 2, "of six; more of the larger would not find room"


def test_what_is_wrong_with_any_trial_is_told_before_one_starts(run_shards: Path, tmp_path: Path) -> None:
    base = tree(run_shards, tmp_path)
    with pytest.raises(ConfigError) as error:
        sweep(build(SweepConfig, base | {"grid": {"method.rank": [8, 64], "parallel.stages": [1, 3, 9]}}))
    text = str(error.value)
    assert "rank64-stages1, rank64-stages3, rank64-stages9: method.rank=64 does not fit " in text
    assert text.count("method.rank=64 does not fit") == 1
    assert "trials rank8-stages3, rank64-stages3: parallel.stages=3 does not fit 2 transformer blocks" in text
    assert "need 9 CPUs" in text
    assert not (tmp_path / "ranks").exists()


def test_a_dry_run_says_what_it_would_cost(
    run_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = build(
        SweepConfig, tree(run_shards, tmp_path) | {"grid": {"method.rank": [4, 8], "quantization.bits": [8, 4]}}
    )
    result = sweep(config, dry_run=True)
    assert (result["trained"], result["scored"], result["status"]) == (2, 4, "dry_run")
    assert result["estimated_s"] > 0
    assert "2 trials, 4 points scored" in capsys.readouterr().err
    assert not (tmp_path / "ranks").exists()


def test_a_sweep_that_does_not_fit_the_disk_is_refused(
    run_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finhpc.commands.sweep.plan.free_bytes", lambda folder: 100_000)
    config = build(SweepConfig, tree(run_shards, tmp_path) | {"grid": {"method.rank": [4, 8]}})
    with pytest.raises(ConfigError, match=r"leaves at least 0\.\d GB .* has 0\.0 GB free; make room there"):
        sweep(config)
    assert not (tmp_path / "ranks").exists()


def test_two_sweeps_of_one_name_at_once(run_shards: Path, tmp_path: Path) -> None:
    config = build(SweepConfig, tree(run_shards, tmp_path) | {"grid": {"method.rank": [4]}})
    with RunFolder(tmp_path, "ranks").lock(), pytest.raises(RunBusyError, match=r"run\.name=ranks is busy"):
        sweep(config)


def test_a_database_of_another_mlflow_is_told_before_training(run_shards: Path, tmp_path: Path) -> None:
    import sqlite3

    made = tmp_path / "made.db"
    MlflowClient(f"sqlite:///{made}").search_experiments()
    with sqlite3.connect(made) as database:
        database.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
    made.rename(tmp_path / "mlflow.db")  # MLflow looks at a database once in a process
    with pytest.raises(ConfigError, match=r"mlflow\.db was written by another version of MLflow .*mlflow db upgrade"):
        sweep(build(SweepConfig, tree(run_shards, tmp_path) | {"grid": {"method.rank": [4]}}))
