"""A real MLflow database with runs of known figures, told by finhpc's own tracker from run folders."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from finhpc.commands.report.runs import Collected, collect
from finhpc.commands.report.store import all_runs, chosen_experiments, open_store
from finhpc.settings.base import build
from finhpc.settings.finetune import FinetuneConfig
from finhpc.settings.pretrain import PretrainConfig
from finhpc.settings.training import TrainingConfig, default_tracking_uri
from finhpc.tracking.describe import Description, parameters
from finhpc.tracking.mirror import Status
from finhpc.tracking.tags import COMMAND, PREFIX, SETTING, setting_tags
from finhpc.tracking.tracker import Tracker
from finhpc.training.journal import Journal


class Store:
    """Runs in `folder`, which its `mlflow.db` tells of."""

    def __init__(self, folder: Path, empty: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        shutil.copy(empty, folder / "mlflow.db")
        self.uri = default_tracking_uri(folder)

    def pretrain(self, name: str, kind: str, rank: int = 64, start: str | None = None, **more: Any) -> str:
        """A pretraining of gpt2-small-cpu (384 wide), 10 steps, 10,240 tokens, unless `more` says otherwise."""
        settings: dict[str, Any] = {
            "model": {"preset": "gpt2-small-cpu"} | ({"path": self.model(start)} if start else {}),
            "method": {"kind": kind, "rank": rank},
            "train": {"steps": 10, "seed": more.pop("seed", 0)},
        }
        for section, values in more.pop("settings", {}).items():
            settings[section] = settings.get(section, {}) | values
        config = build(PretrainConfig, settings)
        result = {"steps": 10, "tokens": 10240, "params_dense": 13_890_000} | more.pop("result", {})
        return self.track(config, name, "pretrain", result, **more)

    def finetune(self, name: str, rank: int, bits: int, base: str = "/models/smol", **more: Any) -> str:
        """An adapter over `base`, 10 steps of 16 examples."""
        train = {"steps": 10, "epochs": None, "seed": more.pop("seed", 0)}
        tree = {
            "model": {"path": base},
            "lora": {"rank": rank},
            "quantization": {"bits": bits},
            "data": {"source": ["/data/fpb.txt"]},
            "train": train,
        }
        result = {"steps": 10, "params_dense": 134_500_000} | more.pop("result", {})
        return self.track(build(FinetuneConfig, tree), name, "finetune", result, **more)

    def model(self, name: str) -> str:
        """The model folder that the run of this name left."""
        return f"{self.folder}/{name}/model"

    def track(
        self,
        config: TrainingConfig,
        name: str,
        verb: str,
        result: Mapping[str, Any],
        status: Status = "FINISHED",
        train: Mapping[int, float] | None = None,
        evals: Mapping[int, float] | None = None,
        tags: Mapping[str, str] | None = None,
        experiment: str = "tests",
        place: Mapping[str, Any] | None = None,
    ) -> str:
        """Journal and result of one run, sent to MLflow as a run's driver sends them; returns the run's id."""
        config.run.name, config.run.storage = name, str(self.folder)
        folder = self.folder / name.replace("/", "_")
        folder.mkdir()
        journal = Journal(folder / "journal.jsonl")
        journal.write("start", **{"step": 0, "workers": 2, "threads": 1, "device": "cpu", **(place or {})})
        for step, loss in (train or {}).items():
            journal.write("train", step=step, train_loss=loss)
        for step, loss in (evals or {}).items():
            journal.write("eval", step=step, val_loss=loss)
        journal.close()
        last = {"val_loss": evals[max(evals)]} if evals else {}
        all_tags = setting_tags(config) | {
            "mlflow.source.name": f"finhpc {verb}",
            COMMAND: verb,
            PREFIX + "dataset_fingerprint": "d" * 64,
            **(tags or {}),
        }
        tracker = Tracker(Description(folder, self.uri, experiment, name, parameters(config, {}, {}), all_tags))
        assert tracker.start().finish(status, last | dict(result))
        assert tracker.run_id
        return tracker.run_id

    def evaluation(self, models: list[str], metrics: Mapping[str, float], adapters: list[str] | None = None) -> str:
        """A run of `finhpc evaluate` itself, as it logs what no run here made."""
        client = MlflowClient(self.uri)
        experiment = client.get_experiment_by_name("tests")
        assert experiment
        run_id = str(client.create_run(experiment.experiment_id, tags={COMMAND: "evaluate"}).info.run_id)
        for key, value in {"model": models, "adapter": adapters or [], "quantization.bits": 16}.items():
            client.set_tag(run_id, SETTING + key, str(value))
        for key, value in metrics.items():
            client.log_metric(run_id, key, value)
        client.set_terminated(run_id)
        return run_id

    def collected(self) -> Collected:
        client = open_store(self.uri)
        return collect(client, all_runs(client, chosen_experiments(client, [])))
