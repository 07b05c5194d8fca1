"""The interface between a command that trains and the run that executes it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from finhpc.settings.training import TrainingConfig
from finhpc.tracking.describe import Dataset, model_name, parameters, shape_of
from finhpc.training.checkpoint import Checkpoint

if TYPE_CHECKING:
    import torch

    from finhpc.training.trainer import Trainer


class Job(ABC):
    """A training whose settings were checked.

    `config`: the settings, with absolute paths. `tags`: more tags for its MLflow run. `varied`: parameters that MLflow
    shows in any case (the keys that a sweep varies).
    """

    command: str
    config: TrainingConfig
    tags: Mapping[str, str] = MappingProxyType({})
    varied: Mapping[str, Any] = MappingProxyType({})

    @property
    @abstractmethod
    def fingerprints(self) -> tuple[str, str | None]:
        """Fingerprints of the data and of the model that training starts from; paths alone do not identify them."""

    @property
    @abstractmethod
    def hf_config(self) -> Any:
        """transformers config of the model that is trained, or of the base."""

    @property
    @abstractmethod
    def datasets(self) -> list[Dataset]:
        """The data it reads, as MLflow lists them."""

    def names(self) -> dict[str, Any]:
        """Parameters that name the model and the data, and the model's shape."""
        names = {"model": model_name(self.config), "dataset": ", ".join(d.name for d in self.datasets)}
        return names | shape_of(self.hf_config)

    def parameters(self) -> dict[str, Any]:
        """The parameters of its MLflow run."""
        return parameters(self.config, self.names(), self.varied)

    def check_checkpoints(self, checkpoints: Path) -> None:  # noqa: B027
        """Raise `ConfigError` if the run's checkpoints were trained on something other than this job's data."""

    @abstractmethod
    def prepare(self, folder: Path) -> None:
        """Write the files that the workers read into the run folder; complete an interrupted preparation."""

    @abstractmethod
    def discard_prepared(self, folder: Path) -> None:
        """Remove the files that `prepare` wrote for other settings."""

    @classmethod
    @abstractmethod
    def trainer(cls, settings: dict[str, Any], folder: Path, device: torch.device, fingerprint: str) -> Trainer:
        """Build the trainer of one worker, in that worker's process.

        `settings`: the job's config as a dict; `folder`: the run folder; `fingerprint`: of the data the run began
        with. Raises `DataError` if the data on disk have changed since.
        """

    @abstractmethod
    def counts(self) -> dict[str, Any]:
        """Keys of the result that are known without training."""

    @abstractmethod
    def save_model(self, folder: Path, checkpoint: Checkpoint) -> None:
        """Write the trained model as `folder`, complete or not at all."""

    @property
    def model_use(self) -> str:
        """What `use_model` does, as it is logged; empty if it does nothing."""
        return ""

    @classmethod
    def use_model(cls, settings: dict[str, Any], folder: Path, device: torch.device) -> dict[str, Any]:
        """Return keys of the result that take the trained model in RUN/model: scores, text.

        Runs where a worker has run, after training: the driver may have neither a GPU nor room for the model.
        """
        return {}

    @abstractmethod
    def summary(self) -> list[tuple[str, str]]:
        """The first rows of the table at the end: what is trained."""

    def loss_note(self, result: dict[str, Any]) -> str:
        """A note after the validation loss in that table."""
        return ""

    @abstractmethod
    def memory_advice(self) -> str:
        """What to lower when memory runs out, the most effective first."""
