"""What every training shares: batches, steps, optimiser, place."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from finhpc.errors import ConfigError
from finhpc.settings.base import MAY_CHANGE, LocalPath, Section, absolute_path

Recompute = Literal["none", "attention", "full"]


class Optimizer(Section):
    name: str = Field(
        "adamw",
        description="adamw; adamw8bit: bitsandbytes' AdamW, moments of matrices of 4,096 weights and more in 8 bits; "
        "or a plugin's",
    )
    lr: float = Field(1e-3, gt=0, description="peak learning rate of AdamW")
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="final over peak learning rate (cosine)")
    warmup_steps: int = Field(
        20, ge=0, description="steps in which the learning rate rises; in a training of fewer than twice as many, half"
    )
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's decay of its two moments")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon, added to the root of the second moment")
    weight_decay: float = Field(0.1, ge=0, description="on matrices; never on biases and norms")
    decay: Literal["factors", "product"] = Field(
        "factors", description="what weight_decay shrinks in a low-rank layer: A and B, or their product B A"
    )
    lr_scale_a: float = Field(1.0, gt=0, description="learning rate of the factors A over that of the rest")
    lr_scale_b: float = Field(1.0, gt=0, description="learning rate of the factors B over that of the rest")
    grad_clip: float = Field(1.0, ge=0, description="largest gradient norm over the whole model; 0: no clipping")

    def warmup(self, steps: int) -> int:
        """Steps of warm-up in a training of `steps`: at most half, so that the peak is reached and left again."""
        return min(self.warmup_steps, max(1, steps // 2))

    def shortened(self, steps: int) -> str | None:
        """What to tell the user where the warm-up of a training of `steps` is shorter than was asked for."""
        if (warmup := self.warmup(steps)) == self.warmup_steps:
            return None
        return (
            f"optimizer.warmup_steps={self.warmup_steps} is more than half of train.steps={steps}; the warm-up takes "
            f"{warmup} {'step' if warmup == 1 else 'steps'}, so that the learning rate reaches its peak and decays."
        )


class Parallel(Section, json_schema_extra=MAY_CHANGE):
    stages: int = Field(1, ge=1, description="pipeline stages")
    replicas: int = Field(1, ge=1, description="copies of the whole pipeline (data parallel)")
    micro_batch_size: int = Field(4, ge=1, description="samples per micro-batch")
    micro_batches: int = Field(1, ge=1, description="micro-batches per step and replica")
    global_batch_size: int | None = Field(
        None, ge=1, description="checked: micro_batch_size x micro_batches x replicas; default: that product"
    )

    def problems(self) -> list[str]:
        """Return what is contradictory, each with its remedy."""
        if self.global_batch_size in (None, self.samples_per_step):
            return []
        return [
            f"parallel.global_batch_size={self.global_batch_size} is not micro_batch_size x micro_batches x replicas = "
            f"{self.micro_batch_size} x {self.micro_batches} x {self.replicas} = {self.samples_per_step}; "
            "change one of them, or leave global_batch_size out."
        ]

    @property
    def workers(self) -> int:
        return self.stages * self.replicas

    @property
    def samples_per_step(self) -> int:
        return self.micro_batch_size * self.micro_batches * self.replicas


class Train(Section):
    steps: int = Field(300, ge=1, description="optimiser steps")
    eval_every: int = Field(
        50, ge=0, description="steps between evaluations; 0: only at the end", json_schema_extra=MAY_CHANGE
    )
    checkpoint_every: int = Field(
        100, ge=0, description="steps between checkpoints; 0: only at the end", json_schema_extra=MAY_CHANGE
    )
    keep_checkpoints: int = Field(2, ge=1, description="newest complete checkpoints kept", json_schema_extra=MAY_CHANGE)
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: autocast over float32 weights")
    recompute: Recompute = Field(
        "none",
        description="what the backward pass computes again instead of keeping it: attention's probabilities, or all of "
        "a block but its input (full)",
        json_schema_extra=MAY_CHANGE,
    )
    seed: int = Field(0, ge=0, description="of the first weights, the order of samples and dropout")
    hang_timeout_s: float = Field(
        600,
        ge=0,
        description="a worker without progress for so long writes its stacks and is restarted (up to the first step "
        "three times as long); must exceed the slowest micro-batch; 0: wait for ever",
        json_schema_extra=MAY_CHANGE,
    )
    sample_prompt: str = Field("", description="start of the text sampled at the end", json_schema_extra=MAY_CHANGE)
    sample_tokens: int = Field(0, ge=0, description="tokens sampled at the end; 0: none", json_schema_extra=MAY_CHANGE)


def default_tracking_uri(storage: str | Path) -> str:
    """Return the address of a database file next to the run folders."""
    folder = absolute_path(str(storage))
    _refuse_characters(folder, f"run.storage={folder}", "give run.tracking_uri")
    return f"sqlite:///{folder}/mlflow.db"


def absolute_tracking_uri(tracking_uri: str) -> str:
    """Return the address; a relative sqlite file is in the current directory."""
    path = tracking_uri.removeprefix("sqlite:///")
    if path == tracking_uri or os.path.isabs(path):
        return tracking_uri
    folder = os.getcwd()
    _refuse_characters(
        folder, f"run.tracking_uri={tracking_uri}, relative to {folder},", "give the path of another database"
    )
    return f"sqlite:///{os.path.abspath(path)}"


def _refuse_characters(folder: str, what: str, otherwise: str) -> None:
    if set(folder) & set("?#%"):
        raise ConfigError(
            f"{what} contains a character (one of ? # %) that a sqlite address cannot have; rename the folder or "
            f"{otherwise}."
        )


class Tracked(Section, json_schema_extra=MAY_CHANGE):
    """Where runs are stored and tracked."""

    storage: LocalPath = Field(
        "runs", validate_default=True, description="folder of run folders, whose mlflow.db is read"
    )
    tracking_uri: Annotated[str, AfterValidator(absolute_tracking_uri)] | None = Field(
        None, description="MLflow server or database; default: sqlite in run.storage"
    )

    @property
    def mlflow_uri(self) -> str:
        """The address of MLflow: `tracking_uri`, or the database in `storage`."""
        return self.tracking_uri or default_tracking_uri(self.storage)


class Run(Tracked):
    name: str = Field("pretrain", description="the run's name: the same name resumes")
    storage: LocalPath = Field(
        "runs", validate_default=True, description="folder of run folders; every node must see it"
    )
    experiment: str = Field("finhpc", description="MLflow experiment")
    max_failures: int = Field(3, ge=0, description="worker failures survived by restarting from the checkpoint")


class Resources(Section, json_schema_extra=MAY_CHANGE):
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda if the cluster has a GPU")
    cpus_per_worker: float = Field(1, gt=0, description="CPUs Ray reserves for a worker")
    threads: int = Field(1, ge=1, description="torch threads per worker")
    gpus_per_worker: float = Field(1, gt=0, description="GPUs Ray reserves for a worker when device is cuda")
