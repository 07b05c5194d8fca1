"""A training before it starts: what one verb that trains has of its own; `finhpc.runs.run` does the rest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from finhpc.settings.finetune import TrainingConfig
from finhpc.tracking.shown import Dataset, model_name, parameters, shape_of
from finhpc.training.checkpoint import Checkpoint

if TYPE_CHECKING:
    import torch

    from finhpc.training.trainer import Trainer

Rows = list[tuple[str, str]]


class Job(ABC):
    """A checked training.

    `config`: its settings, paths whole; `tags`: of its MLflow run, with the usual ones; `varied`: parameters of it that
    are shown whatever they are, in place of the usual ones (what a sweep varies).
    """

    verb: str
    config: TrainingConfig
    tags: Mapping[str, str] = MappingProxyType({})
    varied: Mapping[str, Any] = MappingProxyType({})

    @property
    @abstractmethod
    def fingerprints(self) -> tuple[str, str | None]:
        """Of the data, and of the model it starts from: what the settings cannot say."""

    @property
    @abstractmethod
    def hf_config(self) -> Any:
        """transformers config of the model that is trained, or of the base."""

    @property
    @abstractmethod
    def datasets(self) -> list[Dataset]:
        """What it reads, as MLflow lists it."""

    def names(self) -> dict[str, Any]:
        """Parameters that name its model and its data, with the model's shape."""
        names = {"model": model_name(self.config), "dataset": ", ".join(d.name for d in self.datasets)}
        return names | shape_of(self.hf_config)

    def parameters(self) -> dict[str, Any]:
        """The parameters of its MLflow run."""
        return parameters(self.config, self.names(), self.varied)

    def check_checkpoints(self, checkpoints: Path) -> None:  # noqa: B027
        """Raise `ConfigError` where those of the run were trained on something else than this job's data."""

    @abstractmethod
    def make_ready(self, folder: Path) -> None:
        """Make in the run folder what the workers read, unless it is there; an interrupted making goes on."""

    @abstractmethod
    def forget(self, folder: Path) -> None:
        """Remove what `make_ready` made for other settings."""

    @classmethod
    @abstractmethod
    def trainer(cls, settings: dict[str, Any], folder: Path, device: torch.device, fingerprint: str) -> Trainer:
        """Build the trainer of one worker, in that worker's process.

        `settings`: the job's config as a dict; `folder`: the run folder; `fingerprint`: of the data the run began
        with. Raises `DataError` if the data on disk have changed since.
        """

    @abstractmethod
    def counts(self) -> dict[str, Any]:
        """The keys of the result that can be told without training."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Of the model that is trained."""

    @abstractmethod
    def save_model(self, folder: Path, saved: Checkpoint) -> None:
        """Write the trained model as `folder`, complete or absent."""

    def finish(self, result: dict[str, Any], folder: Path) -> None:  # noqa: B027
        """Add to the result what is made from the trained model."""

    @abstractmethod
    def rows(self) -> Rows:
        """What is trained, in the first lines of the table at the end."""

    def remark(self, result: dict[str, Any]) -> str:
        """Beside the validation loss in that table."""
        return ""

    @abstractmethod
    def dry_run(self, total: dict[str, float] | None) -> dict[str, Any]:
        """Show and return what can be counted and estimated; `total`: what the cluster has, where that is known."""

    @abstractmethod
    def memory_advice(self) -> str:
        """What to lower where memory runs out, dearest first."""
