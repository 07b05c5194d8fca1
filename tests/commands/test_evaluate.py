from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient

from finhpc.commands.evaluate.command import evaluate
from finhpc.commands.report.runs import collect
from finhpc.commands.report.store import all_runs, chosen_experiments
from finhpc.errors import CheckpointError, ConfigError
from finhpc.settings.base import build
from finhpc.settings.evaluate import EvaluateConfig
from tests.evaluation.tasks import write_data, write_model
from tests.waiting import wait_until


def settings(tmp_path: Path, **other: object) -> EvaluateConfig:
    tree = {
        "model": [str(tmp_path / "first"), str(tmp_path / "second")],
        "tasks": ["fpb", "perplexity"],
        "data": {"folder": str(tmp_path / "data"), "shards": str(tmp_path / "first-shards")},
        "bootstrap": 20,
        "workers": 2,
        "run": {"name": "scores", "storage": str(tmp_path / "runs")},
        "resources": {"device": "cpu"},
    }
    return build(EvaluateConfig, tree | other)


def nested(client: MlflowClient, parent: str) -> dict[str, Any]:
    """Model's name -> run of those below an evaluation's."""
    experiment = client.get_run(parent).info.experiment_id
    runs = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
    found = {run.info.run_name.removeprefix("scores/"): run for run in runs}
    assert len(found) == len(runs)
    return found


@contextmanager
def all_cpus_in_use_except_one(free: float) -> Iterator[None]:
    """`free`: the CPUs that were free before the test."""
    import ray

    class User:
        pass

    wait_until(lambda: ray.available_resources().get("CPU", 0) >= free)  # earlier workers have ended
    user = ray.remote(num_cpus=free - 1)(User).remote()
    ray.get(user.__ray_ready__.remote())
    try:
        yield
    finally:
        ray.kill(user)


def test_models_and_tasks_are_scored_logged_and_not_computed_again(
    tmp_path: Path, ray_cluster: None, capfd: pytest.CaptureFixture[str]
) -> None:
    import ray

    free = ray.available_resources()["CPU"]
    write_data(tmp_path / "data")
    for i, name in enumerate(("first", "second")):
        write_model(tmp_path / name, seed=i)
    assert evaluate(settings(tmp_path), dry_run=True)["pairs_pending"] == 4
    result = evaluate(settings(tmp_path))
    scores = {model["name"]: model["scores"] for model in result["models"]}
    assert set(scores) == {"first", "second"}
    for of_model in scores.values():
        assert of_model["fpb"]["majority"]["acc"] == pytest.approx(1 / 3)
        low, high = of_model["perplexity"]["ci95"]["perplexity"]
        assert low <= of_model["perplexity"]["perplexity"] <= high
    folder = tmp_path / "runs" / "scores"
    table = pq.read_table(folder / "scores" / "first" / "fpb.parquet").to_pylist()
    assert sum(row["acc"] for row in table) / len(table) == scores["first"]["fpb"]["acc"]
    client = MlflowClient(tracking_uri=result["tracking_uri"])
    below = nested(client, result["mlflow_run_id"])
    assert {name: run.data.params["model"] for name, run in below.items()} == {name: name for name in scores}
    first, second = (run.data for run in below.values())
    assert {key for key in first.params.keys() | second.params if first.params.get(key) != second.params.get(key)} == {
        "model"
    }, "what MLflow's comparison draws"
    assert next(iter(first.metrics)) == "evaluate/fpb/weighted_f1"
    whole = client.get_run(result["mlflow_run_id"]).data.metrics
    assert whole["evaluate/fpb/weighted_f1"] == max(of["fpb"]["weighted_f1"] for of in scores.values())
    assert whole["evaluate/perplexity/perplexity"] == min(of["perplexity"]["perplexity"] for of in scores.values())
    logged = {found.dataset.name: found.dataset.digest for found in below["first"].inputs.dataset_inputs}
    assert set(logged) == {"fpb", "first-shards"}
    assert [key for key in first.tags if not key.startswith("mlflow.")] == []
    evaluations = collect(client, all_runs(client, chosen_experiments(client, []))).evaluations
    assert {run.id for run in evaluations} == {run.info.run_id for run in below.values()}, "what reports read"
    for name, run in below.items():
        assert run.data.metrics["evaluate/fpb/weighted_f1"] == scores[name]["fpb"]["weighted_f1"]
    assert "scores.json" in {file.path for file in client.list_artifacts(result["mlflow_run_id"])}

    # One pair's file is lost, one model is another: those alone are to be scored again.
    (folder / "scores" / "first" / "fpb.json").unlink()
    write_model(tmp_path / "third", seed=7)
    (tmp_path / "third").rename(tmp_path / "second-new")
    for file in (tmp_path / "second-new").iterdir():
        file.replace(tmp_path / "second" / file.name)
    capfd.readouterr()
    assert evaluate(settings(tmp_path), dry_run=True)["pairs_pending"] == 3
    assert "2 models x 2 tasks, 3 of 4 pairs to score" in capfd.readouterr().err
    one = settings(tmp_path, model=[str(tmp_path / "first")], tasks=["perplexity"])
    evaluate(one, dry_run=True)
    assert "1 model x 1 task, 0 of 1 pair to score" in capfd.readouterr().err

    # A model that cannot be opened does not keep the others from being scored, here by the one worker that has room.
    broken = write_model(tmp_path / "broken") / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-100])
    models = [str(tmp_path / name) for name in ("broken", "first", "second")]
    with all_cpus_in_use_except_one(free), pytest.raises(CheckpointError) as caught:
        evaluate(settings(tmp_path, model=models, tasks=["fpb"], workers=0))
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("broken on fpb: ")
    assert "damaged" in lines[0]
    assert lines[-1].startswith("2 other pairs of 3 scored in ")
    kept = json.loads((folder / "result.json").read_text())
    assert kept["status"] == "failed"
    assert [(row["model"], row["task"]) for row in kept["failed"]] == [("broken", "fpb")]
    by_name = {model["name"]: model["scores"] for model in kept["models"]}
    assert by_name["broken"] == {}
    assert by_name["first"]["fpb"]["acc"] == scores["first"]["fpb"]["acc"]
    assert by_name["second"]["fpb"]["examples"] == 6
    assert kept["mlflow_run_id"] == result["mlflow_run_id"]
    again = nested(client, result["mlflow_run_id"])
    assert set(again) == {"broken", "first", "second"}
    assert all(again[name].info.run_id == run.info.run_id for name, run in below.items()), "no run twice"
    assert evaluate(settings(tmp_path, tasks=["fpb"]), dry_run=True)["pairs_pending"] == 0


def test_all_problems_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        evaluate(settings(tmp_path, quantization={"bits": 4, "scheme": "int8"}))
    text = str(caught.value)
    assert "first does not exist" in text
    assert "data.folder" in text
    assert "quantization.scheme=int8" in text
    assert not list(tmp_path.rglob(".lock")), "a refused command leaves no run folder"
