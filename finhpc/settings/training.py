"""What every training shares: optimizer, parallelism, steps, the run's name and place, resources."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field

from finhpc.errors import ConfigError
from finhpc.settings.base import MAY_CHANGE, LocalPath, Section, absolute_path

if TYPE_CHECKING:
    from finhpc.settings.finetune import FinetuneConfig
    from finhpc.settings.pretrain import PretrainConfig

TrainingConfig: TypeAlias = "PretrainConfig | FinetuneConfig"
# YAML reads on and off as true and false.
OnOff = BeforeValidator(lambda value: {True: "on", False: "off"}[value] if isinstance(value, bool) else value)
Compile = Annotated[Literal["auto", "on", "off"], OnOff]
Precision = Literal["fp32", "bf16", "bf16-weights"]
Recompute = Literal["none", "attention", "full"]
Schedule = Literal["1f1b", "dualpipev"]


class Optimizer(Section):
    """The optimizer and its learning rate."""

    name: str = Field(
        "adamw",
        description="adamw; adamw8bit: bitsandbytes' AdamW, with 8-bit moments of matrices from 4,096 weights up; "
        "muon: orthogonalized momentum for matrices of blocks; spectron: the same for A and B of blocks, with bounded "
        "steps of B A; loro: AdamW with exact steps of B A at times; apollo_mini: AdamW's step sizes from a random "
        "projection of each matrix of blocks; relora: pairs of low rank, one after another, added to matrices "
        "of blocks; or one of a plugin. AdamW updates what the others have no rule for",
    )
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    lr_adamw: float | None = Field(
        None,
        gt=0,
        description="peak learning rate of what AdamW updates next to another optimizer: embeddings, head, norms, "
        "biases; with adamw and others that update everything, of these too; default: lr",
    )
    schedule: Literal["cosine", "linear", "wsd", "restarts"] = Field(
        "cosine",
        description="how the learning rate falls after the warm-up; wsd: only in the last cooldown_share of the steps, "
        "linearly; restarts: cosine, with another warm-up every restart_every steps",
    )
    cooldown_share: float = Field(0.2, gt=0, le=1, description="wsd: share of the steps in which the rate falls")
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="final learning rate divided by the peak")
    warmup_steps: int = Field(20, ge=0, description="steps in which the learning rate rises; at most half of all steps")
    betas: tuple[float, float] = Field((0.9, 0.95), description="decay rates of AdamW's two moments")
    momentum: float = Field(0.95, ge=0, lt=1, description="momentum of muon and spectron")
    restart_every: int = Field(
        500,
        ge=1,
        description="steps from one exact step of B A to the next (loro), from one pair to the next (relora), from one "
        "warm-up to the next (schedule=restarts)",
    )
    restart_warmup_steps: int = Field(20, ge=0, description="restarts: steps of each warm-up after the first")
    dense_cycles: int = Field(
        1, ge=0, description="relora: times restart_every steps at the start in which AdamW updates whole matrices"
    )
    rank: int = Field(64, ge=1, description="relora: rank of the pairs")
    eps: float = Field(1e-8, gt=0, description="epsilon of AdamW, added to the root of the second moment")
    weight_decay: float = Field(0.1, ge=0, description="weight decay of matrices; biases and norms have none")
    decay: Literal["factors", "product"] = Field(
        "factors", description="what weight decay shrinks in a low-rank layer: A and B (factors), or B A (product)"
    )
    rates: Literal["plain", "mup", "loro", "loraplus"] = Field(
        "plain",
        description="learning rates of A and B over that of the rest; plain: 1; mup: 1/2 and in / (2 rank); loro: rank "
        "/ width for both; loraplus: 1 and 16",
    )
    grad_clip: float = Field(1.0, ge=0, description="largest gradient norm of the whole model; 0: no clipping")

    def problems(self, steps: int) -> list[str]:
        """Return what does not work in a training of `steps`, with its remedy."""
        dense = self.dense_cycles * self.restart_every
        if self.name != "relora" or dense < steps:
            return []
        return [
            f"optimizer.name=relora trains its first pair after optimizer.dense_cycles x restart_every = "
            f"{self.dense_cycles} x {self.restart_every} = {dense} steps, and train.steps={steps}; lower one of them, "
            "or use optimizer.name=adamw."
        ]

    def warmup(self, steps: int) -> int:
        """Return the warm-up steps of a training of `steps`: at most half, so that the rate reaches its peak."""
        return min(self.warmup_steps, max(1, steps // 2))

    def shortened(self, steps: int) -> str | None:
        """Return a note for the user if the warm-up of a training of `steps` is shorter than requested."""
        if (warmup := self.warmup(steps)) == self.warmup_steps:
            return None
        return (
            f"optimizer.warmup_steps={self.warmup_steps} is more than half of train.steps={steps}; the warm-up takes "
            f"{warmup} {'step' if warmup == 1 else 'steps'}, so that the learning rate reaches its peak and decays."
        )


class Parallel(Section, json_schema_extra=MAY_CHANGE):
    """How a step is divided among workers."""

    stages: int = Field(1, ge=1, description="pipeline stages")
    replicas: int = Field(1, ge=1, description="copies of the whole pipeline (data parallelism)")
    micro_batch_size: int = Field(4, ge=1, description="samples per micro-batch")
    micro_batches: int = Field(1, ge=1, description="micro-batches per step and replica")
    schedule: Schedule = Field(
        "1f1b",
        description="order of passes over the stages; 1f1b: one forward, one backward; dualpipev: each of the `stages` "
        "workers has two of 2 x stages stages, which computes more of the time and stores more activations; needs 2 x "
        "stages micro-batches or more (pretraining)",
    )
    global_batch_size: int | None = Field(
        None, ge=1, description="samples per step, as a check; default: micro_batch_size x micro_batches x replicas"
    )
    shard_optimizer: bool = Field(
        False,
        description="divide the optimizer's state among the replicas: 8 bytes per parameter become 8 / replicas, and "
        "each step sends the updated weights in addition to the gradients",
    )

    def problems(self) -> list[str]:
        """Return what is contradictory, each with its remedy."""
        problems, least = [], 2 * self.stages
        if self.global_batch_size not in (None, self.samples_per_step):
            problems.append(
                f"parallel.global_batch_size={self.global_batch_size} is not micro_batch_size x micro_batches x "
                f"replicas = {self.micro_batch_size} x {self.micro_batches} x {self.replicas} = "
                f"{self.samples_per_step}; change one of them, or leave global_batch_size out."
            )
        if self.schedule == "dualpipev" and self.stages == 1:
            problems.append(
                "parallel.schedule=dualpipev needs several workers to exchange micro-batches, but parallel.stages=1; "
                "use parallel.stages=2 or more, or parallel.schedule=1f1b."
            )
        elif self.schedule == "dualpipev" and self.micro_batches < least:
            problems.append(
                f"parallel.schedule=dualpipev needs 2 x parallel.stages = {least} micro-batches or more, but "
                f"parallel.micro_batches={self.micro_batches}; use {least} or more, or parallel.schedule=1f1b."
            )
        if self.shard_optimizer and self.replicas == 1:
            problems.append(
                "parallel.shard_optimizer=true divides the optimizer's state among replicas, and parallel.replicas is "
                "1; use 2 or more replicas, or leave shard_optimizer out."
            )
        return problems

    @property
    def workers(self) -> int:
        return self.stages * self.replicas

    @property
    def samples_per_step(self) -> int:
        return self.micro_batch_size * self.micro_batches * self.replicas


class Train(Section):
    """How long to train, and what happens on the way."""

    steps: int = Field(300, ge=1, description="optimizer steps")
    eval_every: int = Field(
        50, ge=0, description="steps between evaluations; 0: only at the end", json_schema_extra=MAY_CHANGE
    )
    checkpoint_every: int = Field(
        100, ge=0, description="steps between checkpoints; 0: only at the end", json_schema_extra=MAY_CHANGE
    )
    keep_checkpoints: int = Field(
        2, ge=1, description="how many of the newest complete checkpoints to keep", json_schema_extra=MAY_CHANGE
    )
    precision: Precision = Field(
        "fp32",
        description="fp32; bf16: autocast over float32 weights; bf16-weights: all weights and activations are "
        "bfloat16, made in each step from float32 weights that the optimizer updates",
    )
    recompute: Recompute = Field(
        "none",
        description="activations that the backward pass recomputes to save memory: attention's probabilities "
        "(attention), or all of a block except its input (full)",
        json_schema_extra=MAY_CHANGE,
    )
    compile: Compile = Field(
        "auto",
        description="torch.compile of the model's blocks: on, off, or auto: if the steps are long enough to repay it "
        "and a C++ compiler is installed",
        json_schema_extra=MAY_CHANGE,
    )
    seed: int = Field(0, ge=0, description="seed of the initial weights, the order of samples and dropout")
    hang_timeout_s: float = Field(
        600,
        ge=0,
        description="seconds without progress after which a worker writes its stack traces and is restarted (three "
        "times as long before the first step); must exceed the slowest micro-batch; 0: wait forever",
        json_schema_extra=MAY_CHANGE,
    )
    sample_prompt: str = Field(
        "", description="prompt of the text that is sampled at the end", json_schema_extra=MAY_CHANGE
    )
    sample_tokens: int = Field(
        0, ge=0, description="tokens to sample at the end; 0: none", json_schema_extra=MAY_CHANGE
    )

    @property
    def products(self) -> Literal["fp32", "bf16"]:
        """The type of matrix products."""
        return "fp32" if self.precision == "fp32" else "bf16"


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
        "runs", validate_default=True, description="folder of the run folders, whose mlflow.db is read"
    )
    tracking_uri: Annotated[str, AfterValidator(absolute_tracking_uri)] | None = Field(
        None, description="MLflow server or database; default: mlflow.db in run.storage"
    )

    @property
    def mlflow_uri(self) -> str:
        """The address of MLflow: `tracking_uri`, or the database in `storage`."""
        return self.tracking_uri or default_tracking_uri(self.storage)


class Run(Tracked):
    """The run's name, its folder, and its MLflow experiment."""

    name: str = Field("pretrain", description="name of the run; the same name resumes it")
    storage: LocalPath = Field(
        "runs", validate_default=True, description="folder of the run folders; every node must see it"
    )
    experiment: str = Field("finhpc", description="MLflow experiment")
    stop_grace_s: float = Field(
        25,
        ge=0,
        description="seconds to save a checkpoint after SIGTERM or SIGHUP (a closed terminal) before the run ends "
        "without it; less than what the scheduler grants",
    )
    max_failures: int = Field(3, ge=0, description="worker failures after which the run restarts from its checkpoint")


class Resources(Section, json_schema_extra=MAY_CHANGE):
    """What Ray reserves for each worker."""

    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="cpu, cuda, or auto: cuda if the cluster has a GPU"
    )
    cpus_per_worker: float = Field(1, gt=0, description="CPUs that Ray reserves per worker")
    threads: int = Field(1, ge=1, description="torch threads per worker")
    gpus_per_worker: float = Field(1, gt=0, description="GPUs that Ray reserves per worker if the device is cuda")
