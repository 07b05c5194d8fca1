"""A training whose figures cannot be is no finished run, on disk or in MLflow; once the cause is gone it finishes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from finhpc.commands.pretrain import pretrain
from finhpc.errors import ImplausibleError
from finhpc.settings.base import build
from finhpc.settings.pretrain import PretrainConfig
from finhpc.training.journal import Journal
from tests.tiny import pretrain_tree

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_training")]


def config(shards: Path, storage: Path, **sections: Any) -> PretrainConfig:
    short = {"train": {"steps": 8, "eval_every": 0, "checkpoint_every": 0}, "optimizer": {"warmup_steps": 1}}
    return build(PretrainConfig, pretrain_tree(shards, storage, **short | sections))


def test_a_training_that_diverged_to_finite_numbers_fails(run_shards: Path, tmp_path: Path) -> None:
    wild = config(run_shards, tmp_path, optimizer={"lr": 50.0, "warmup_steps": 0})
    with pytest.raises(ImplausibleError, match=r"pretrain run: val_loss=.*is above.*lower optimizer\.lr") as caught:
        pretrain(wild)
    assert caught.value.exit_code == 1
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == "failed"
    run = MlflowClient(result["tracking_uri"]).get_run(result["mlflow_run_id"])
    assert run.info.status == "FAILED"


def test_a_run_with_a_loss_that_cannot_be_is_scored_anew(run_shards: Path, tmp_path: Path) -> None:
    """As after a start whose workers read the weights wrongly: its journal holds the loss, its result says failed."""
    good = pretrain(config(run_shards, tmp_path))
    folder = tmp_path / "run"
    journal = Journal(folder / "journal.jsonl")
    journal.write("eval", step=8, tokens=1, val_loss=238_831.0, val_perplexity=float("inf"))
    journal.close()
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(result | {"status": "failed", "val_loss": 238_831.0}))
    again = pretrain(config(run_shards, tmp_path))
    assert again["status"] == "finished"
    assert again["val_loss"] == good["val_loss"]
    run = MlflowClient(again["tracking_uri"]).get_run(again["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["val_loss"] == good["val_loss"]
