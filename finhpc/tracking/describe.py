"""Describe a run to MLflow: its parameters and its datasets.

MLflow's comparison page draws the first three parameters, by name, that differ between the selected runs (a
parameter that one run lacks counts as different). So the parameters are the settings that change what is trained, the
same ones for every run of a command. All settings, including those that only place a run, are tags
(`finhpc.tracking.tags`).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finhpc.files import file_sha256, redact
from finhpc.settings.base import Section, flatten
from finhpc.settings.pretrain import PretrainConfig
from finhpc.settings.training import TrainingConfig, absolute_tracking_uri

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput

    from finhpc.data.shards.shards import Shards

FULL_RANK = "full"  # method.rank of a dense model
PLACING = re.compile(
    r"(grid|sweep|run|resources|model|study)(\..*)?|data\.(shards|source|eval_source|files|folder|encoding|hf_split)"
    r"|train\.(epochs|eval_every|checkpoint_every|keep_checkpoints|hang_timeout_s|sample_.*)"
    r"|parallel\.global_batch_size|adapter|workers|batch_size|bootstrap|trust_task_code"
)
GENERIC = {"model", "shards", "adapter", "data"}  # folder names that identify nothing alone
NAME_LENGTH, SOURCE_LENGTH = 500, 65535  # MLflow's limits of a dataset
DIGEST_LENGTH = 16  # of a sha256, to fit into the list of runs; the dataset's profile has all of it


def parameters(config: Section, named: Mapping[str, Any], varied: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that MLflow's pages show, by name.

    `named`: names in place of paths, and the model's shape. `varied`: the values of the keys that a sweep varies, shown
    in any case.
    """
    flat = flatten(config)
    shown = {key: value for key, value in flat.items() if value is not None and not PLACING.fullmatch(key)}
    if (epochs := flat.get("train.epochs")) is not None:  # the steps follow from them, and are a metric
        shown["train.epochs"] = epochs
        shown.pop("train.steps", None)
    shown |= {**named, **varied}
    if "train.epochs" in varied:
        shown.pop("train.steps", None)
    if isinstance(config, PretrainConfig) and config.method.kind == "dense":
        shown["method.rank"] = FULL_RANK
    return shown


def model_name(config: TrainingConfig) -> str:
    """Name of the model that a run trains: the folder it starts from, or its preset."""
    if config.model.path:
        return short_name(config.model.path)
    return config.model.preset if isinstance(config, PretrainConfig) else "unknown"


def trained_model(path: str) -> str:
    """The model that was trained: `path`, or for a decomposed model the dense model it was made from."""
    seen = set()
    while path not in seen and (result := Path(path) / "result.json").is_file():
        seen.add(path)
        try:
            source = json.loads(result.read_text(encoding="utf-8")).get("source")
        except (ValueError, AttributeError):
            break
        if not isinstance(source, str):
            break
        path = source
    return path


def shape_of(hf_config: Any) -> dict[str, Any]:
    """A model's shape as parameters, whether the settings or the folder it starts from define it."""
    names = {
        "model.layers": hf_config.num_hidden_layers,
        "model.width": hf_config.hidden_size,
        "model.heads": hf_config.num_attention_heads,
        "model.kv_heads": getattr(hf_config, "num_key_value_heads", None),
        "model.mlp_width": getattr(hf_config, "intermediate_size", None),
    }
    return {key: value for key, value in names.items() if value is not None}


def short_name(path: str) -> str:
    """The last meaningful part of a path: `runs/first/model` is first, `news/shards` is news/shards."""
    folder = Path(path)
    if folder.name not in GENERIC or not folder.parent.name:
        return folder.name or path
    return folder.parent.name if folder.name in ("model", "adapter") else f"{folder.parent.name}/{folder.name}"


@dataclass
class Description:
    """What MLflow shows of the run in `folder`, and where."""

    folder: Path
    tracking_uri: str
    experiment: str
    run_name: str
    params: Mapping[str, Any]
    tags: Mapping[str, Any]
    datasets: Sequence[Dataset] = ()

    def __post_init__(self) -> None:
        # Now: the current directory may be another one when a thread sends the run.
        self.tracking_uri = absolute_tracking_uri(self.tracking_uri)


@dataclass(frozen=True)
class Dataset:
    """Data that a run reads, as MLflow lists it. `sha256`: of the content; `counts`: numbers, never text."""

    name: str
    sha256: str
    source: str
    use: str = "training"
    counts: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_shards(cls, shards: Shards, use: str = "training") -> Dataset:
        """A prepared folder."""
        counts = {f"{split}_tokens": counts.tokens for split, counts in shards.manifest.counts.items()}
        return cls(short_name(str(shards.folder)), shards.manifest.fingerprint, str(shards.folder), use, counts)

    @classmethod
    def of_file(cls, source: str, otherwise: str, use: str = "training") -> Dataset:
        """A file of examples; `otherwise`: the sha256 of the examples, used if the source is not a file."""
        named = Path(source) if os.path.isfile(source) else Path(source.rpartition(":")[0])  # FILE:FORMAT
        if not named.is_file():
            return cls(source.removeprefix("hf:"), otherwise, source, use)
        return cls(named.name, file_sha256(named), str(named), use)

    def entity(self) -> DatasetInput:
        from mlflow.entities import Dataset as Entity
        from mlflow.entities import DatasetInput, InputTag

        kind = "hugging_face" if self.source.startswith("hf:") else "local"
        where = {"path": self.source.removeprefix("hf:")} if kind == "hugging_face" else {"uri": self.source}
        profile = json.dumps({"sha256": self.sha256, **self.counts})
        source = redact(json.dumps(where))[:SOURCE_LENGTH]
        entity = Entity(self.name[:NAME_LENGTH], self.sha256[:DIGEST_LENGTH], kind, source, profile=profile)
        return DatasetInput(entity, [InputTag("mlflow.data.context", self.use)])
