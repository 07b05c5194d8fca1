"""Whole runs on a real Ray: what they leave behind, what they refuse, how they fail."""

from __future__ import annotations

import csv
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

import finhpc
from finhpc.commands.pretrain import Pretrain, pretrain
from finhpc.data.shards.reader import ReplicaStream, local_stream
from finhpc.data.shards.shards import Shards
from finhpc.errors import ConfigError, RunBusyError, TrainingFailedError
from finhpc.evaluation.sample_losses import SAMPLE_LOSSES
from finhpc.runs.folder import RunFolder
from finhpc.runs.run import run
from finhpc.settings.base import build
from finhpc.settings.pretrain import PretrainConfig
from finhpc.settings.report import ReportConfig
from finhpc.tracking.tags import PREFIX
from finhpc.training.checkpoint import list_complete
from finhpc.training.journal import latest, read
from tests.runs.runs import launch_quickly
from tests.tiny import pretrain_tree, tiny_shards

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_shards(tmp_path_factory.mktemp("data") / "shards")


def config(shards: Path, storage: Path, **sections: Any) -> PretrainConfig:
    tree = pretrain_tree(
        shards,
        storage,
        model={"layers": 3},
        data={"final_samples": 12},
        optimizer={"lr": 3e-3, "warmup_steps": 5},
        parallel={"stages": 2, "micro_batch_size": 4, "micro_batches": 4},
        train={"steps": 60, "eval_every": 30, "checkpoint_every": 20, "sample_tokens": 8},
    )
    return build(PretrainConfig, tree | {section: tree.get(section, {}) | more for section, more in sections.items()})


@pytest.fixture(scope="module")
def finished(
    warm_workers: None, shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PretrainConfig, dict[str, Any]]:
    settings = config(shards, tmp_path_factory.mktemp("runs"))
    return settings, run(Pretrain(settings), launch=launch_quickly)


def test_the_report_tells_of_the_run_what_its_result_says(
    finished: tuple[PretrainConfig, dict[str, Any]], tmp_path: Path
) -> None:
    settings, result = finished
    config = build(ReportConfig, {"run": {"storage": settings.run.storage}, "out": str(tmp_path)})
    row = finhpc.report(config)["tables"]["vi"][0]
    assert (row["model"], row["scale_model"], row["paper_model"]) == (
        "GPT-2 3 x 32-r8",
        "GPT-2 3 x 32",
        "GPT2-127M-r192",
    )
    assert row["scale_amount"] == result["tokens"]
    for name in ("params_total", "val_loss", "worker_hours"):
        assert row[name] == result[name]
    assert row["memory_gb"] == sum(result["peak_memory_bytes"]) / 1e9
    assert "2 workers, on CPU, 1 thread each" in (tmp_path / "report.html").read_text()


def test_a_run_learns_and_its_result_is_complete(finished: tuple[PretrainConfig, dict[str, Any]]) -> None:
    settings, result = finished
    records, _ = read(Path(settings.run.storage) / "run" / "journal.jsonl")
    losses = [r["train_loss"] for r in latest(records, "train").values()]
    assert len(losses) == 60
    assert losses[-1] < losses[0] - 0.5
    assert result["status"] == "finished"
    assert result["steps"] == 60
    assert result["tokens"] == 60 * 16 * 32
    assert result["val_perplexity"] == pytest.approx(math.exp(result["val_loss"]))
    assert result["pipeline_utilization_ideal"] == pytest.approx(4 / 5)
    assert 0 < result["pipeline_utilization"] < 1
    assert len(result["peak_memory_bytes"]) == len(result["peak_resident_bytes"]) == 2
    assert sum(result["peak_memory_bytes"]) > 16 * result["params_total"]
    assert sum(result["peak_memory_bytes"]) < sum(result["peak_resident_bytes"])
    assert result["sample"]
    on_disk = json.loads((Path(settings.run.storage) / "run" / "result.json").read_text())
    assert on_disk == result
    assert not [key for key, value in result.items() if value is None and key != "resumed_from_step"]


def test_the_saved_model_scores_what_the_run_reported(finished: tuple[PretrainConfig, dict[str, Any]]) -> None:
    settings, result = finished
    model = finhpc.load_model(result["model"])
    held_out = torch.from_numpy(Shards.open(str(settings.data.shards)).eval_samples(16, 32))
    with torch.no_grad():
        loss = model(held_out, labels=held_out).loss.item()
    assert loss == pytest.approx(result["val_loss"], rel=1e-5)


def test_the_final_loss_has_the_standard_error_of_its_samples(finished: tuple[PretrainConfig, dict[str, Any]]) -> None:
    settings, result = finished
    model = finhpc.load_model(result["model"])
    samples = torch.from_numpy(Shards.open(str(settings.data.shards)).eval_samples(12, 32))
    with torch.no_grad():
        losses = [model(sample[None], labels=sample[None]).loss.item() for sample in samples]
    with open(Path(settings.run.storage) / "run" / SAMPLE_LOSSES, encoding="utf-8") as file:
        assert [float(row["loss"]) for row in csv.DictReader(file)] == pytest.approx(losses, rel=1e-5)
    assert result["final_val_loss"] == pytest.approx(statistics.fmean(losses), rel=1e-5)
    assert result["final_val_loss_se"] == pytest.approx(statistics.stdev(losses) / math.sqrt(12), rel=1e-3)
    assert result["final_val_tokens"] == 12 * 31


def test_what_was_consumed_is_the_seeded_order(finished: tuple[PretrainConfig, dict[str, Any]]) -> None:
    from finhpc.training.trainer import sample_hash

    settings, result = finished
    stream = ReplicaStream(Shards.open(str(settings.data.shards)), 32, 0, 0, 60, 16, 4)
    ids = [sample for batch in local_stream(stream) for sample in batch["sample"].tolist()]
    total = sum(sample_hash(position, sample) for position, sample in enumerate(ids)) % 2**256
    assert result["consumed_sha256"] == f"{total:064x}"
    assert len(set(ids[:96])) == 96, "the first epoch reads no sample twice"


def test_mlflow_has_the_run(finished: tuple[PretrainConfig, dict[str, Any]]) -> None:
    _, result = finished
    client = MlflowClient(result["tracking_uri"])
    recorded = client.get_run(result["mlflow_run_id"])
    assert recorded.info.status == "FINISHED"
    assert recorded.data.params["method.rank"] == "8"
    assert recorded.data.metrics["val_loss"] == result["val_loss"]
    history = client.get_metric_history(recorded.info.run_id, "train_loss")
    assert sorted(point.step for point in history) == list(range(1, 61))
    assert recorded.data.tags[PREFIX + "dataset_fingerprint"]
    assert next(iter(recorded.data.metrics)) == "val_loss"
    assert not [key for key in recorded.data.tags if not key.startswith("mlflow.")]
    (logged,) = recorded.inputs.dataset_inputs
    assert recorded.data.tags[PREFIX + "dataset_fingerprint"].startswith(logged.dataset.digest)


def test_the_model_opens_from_mlflow_in_a_fresh_process(finished: tuple[PretrainConfig, dict[str, Any]]) -> None:
    _, result = finished
    code = (
        "import mlflow, sys; mlflow.set_tracking_uri(sys.argv[1]);"
        "run = mlflow.MlflowClient().get_run(sys.argv[2]);"
        "uri = 'models:/' + run.outputs.model_outputs[0].model_id;"
        "print(mlflow.pyfunc.load_model(uri).predict(['the bank']))"
    )
    words = [sys.executable, "-c", code, result["tracking_uri"], result["mlflow_run_id"]]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "the bank" in done.stdout


def test_a_finished_run_returns_its_result_and_other_settings_are_refused(
    finished: tuple[PretrainConfig, dict[str, Any]], shards: Path
) -> None:
    settings, result = finished
    again = pretrain(settings)
    assert again == result
    with pytest.raises(ConfigError) as caught:
        pretrain(config(shards, Path(settings.run.storage), method={"rank": 4}, train={"seed": 1}))
    assert "method.rank was 8 in the run's config, now 4" in str(caught.value)
    assert "train.seed was 0" in str(caught.value)


@pytest.mark.usefixtures("quick_training")
def test_more_steps_continue_a_finished_run(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretrain(config(shards, tmp_path, train={"steps": 10}, parallel={"stages": 1}))
    monkeypatch.setattr("finhpc.models.initialize.initialize", lambda *given, **more: pytest.fail("drawn, not loaded"))
    result = pretrain(config(shards, tmp_path, train={"steps": 14}, parallel={"stages": 1}))
    assert result["steps"] == 14
    assert result["resumed_from_step"] == 10


@pytest.mark.usefixtures("quick_training")
def test_a_loss_that_is_not_finite_fails_the_run(shards: Path, tmp_path: Path) -> None:
    diverging = config(
        shards, tmp_path, optimizer={"lr": 1e30, "warmup_steps": 0, "grad_clip": 0}, train={"checkpoint_every": 1}
    )
    with pytest.raises(TrainingFailedError, match="at step"):
        pretrain(diverging)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == "failed"
    recorded = MlflowClient(result["tracking_uri"]).get_run(result["mlflow_run_id"])
    assert recorded.info.status == "FAILED"
    records, _ = read(tmp_path / "run" / "journal.jsonl")
    assert len([r for r in records if r["kind"] == "start"]) == 1, "must not be retried"
    for saved in list_complete(tmp_path / "run" / "checkpoints"):
        assert all(torch.isfinite(tensor).all() for _, tensor in saved.tensors("param"))


def test_more_workers_than_fit_are_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"= 40 workers of resources\.cpus_per_worker=1 need 40 CPUs"):
        pretrain(
            config(
                shards,
                tmp_path,
                parallel={"stages": 2, "replicas": 20, "micro_batch_size": 1},
                data={"eval_samples": 64},
            )
        )


def test_a_refused_run_leaves_nothing(shards: Path, tmp_path: Path) -> None:
    many = {"stages": 2, "replicas": 20, "micro_batch_size": 1}
    for dry_run in (True, False):
        with pytest.raises(ConfigError, match="need 40 CPUs"):
            finhpc.pretrain(config(shards, tmp_path, parallel=many, data={"eval_samples": 64}), dry_run=dry_run)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("quick_training")
def test_paths_may_be_relative_and_a_failed_start_may_be_corrected(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shards.parent)
    bad = {"lr": 1e30, "warmup_steps": 0, "grad_clip": 0}
    short = {"steps": 4, "sample_tokens": 0, "checkpoint_every": 0}
    with pytest.raises(TrainingFailedError, match=r"Lower optimizer\.lr \(now 1e\+30\)"):
        pretrain(
            config(Path("shards"), Path("runs"), optimizer=bad, train=short | {"steps": 9}, parallel={"stages": 1})
        )
    result = pretrain(config(Path("shards"), Path("runs"), train=short, parallel={"stages": 1}))
    assert result["status"] == "finished"
    assert result["resumed_from_step"] is None
    records, _ = read(shards.parent / "runs" / "run" / "journal.jsonl")
    assert len([r for r in records if r["kind"] == "start"]) == 1, "the failed start's numbers are set aside"
    assert len(list((shards.parent / "runs" / "run").glob("journal.jsonl.until-*"))) == 1
    assert str(shards) in (shards.parent / "runs" / "run" / "config.yaml").read_text()


def test_a_gpu_that_is_not_there_is_an_error(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"resources\.device=cuda, but the cluster has no GPU"):
        pretrain(config(shards, tmp_path, resources={"device": "cuda"}))


def test_two_runs_of_one_name_at_once(shards: Path, tmp_path: Path) -> None:
    with RunFolder(tmp_path, "run").lock(), pytest.raises(RunBusyError, match=r"run\.name=run is busy"):
        pretrain(config(shards, tmp_path))


@pytest.mark.usefixtures("quick_training")
def test_replicas_read_one_global_order(shards: Path, tmp_path: Path) -> None:
    one = pretrain(config(shards, tmp_path / "a", parallel={"stages": 1}, train={"steps": 12, "sample_tokens": 0}))
    split = {"stages": 1, "replicas": 2, "micro_batches": 2}
    two = pretrain(config(shards, tmp_path / "b", parallel=split, train={"steps": 12, "sample_tokens": 0}))
    assert two["consumed_sha256"] == one["consumed_sha256"]
    assert two["val_loss"] == pytest.approx(one["val_loss"], rel=1e-5)
