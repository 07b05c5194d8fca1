"""`finhpc pretrain`: token shards -> a model, resumable at any moment."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finhpc.cluster.connect import ray_cluster
from finhpc.models.files.manifest import check_manifest
from finhpc.planning.model import DECOMPOSED, initial_fill, needs_decomposing
from finhpc.planning.plan import check_tokenizer, describe_compression, hf_config_of, make_plan
from finhpc.runs.job import Job
from finhpc.runs.result import lower_batch, millions
from finhpc.runs.run import mlflow_checked, run
from finhpc.settings.pretrain import PretrainConfig
from finhpc.tracking.describe import Dataset
from finhpc.training.checkpoint import Checkpoint

if TYPE_CHECKING:
    import torch

    from finhpc.training.trainer import Trainer

log = logging.getLogger(__name__)


def pretrain(config: PretrainConfig) -> dict[str, Any]:
    """Train a model and return the content of `result.json`.

    The same `run.name` and `run.storage` resume; a finished run returns its result at once. Raises
    `ConfigError` for settings that cannot work, `TrainingFailedError` or another `FinhpcError` when training fails.
    """
    return run(mlflow_checked(Pretrain(config)))


class Pretrain(Job):
    """Train a model on token shards."""

    command = "pretrain"

    def __init__(self, config: PretrainConfig) -> None:
        self.config: PretrainConfig = config
        self.plan = make_plan(config)

    @property
    def fingerprints(self) -> tuple[str, str | None]:
        return self.plan.shards.manifest.fingerprint, self.plan.init_model.fingerprint if self.plan.init_model else None

    @property
    def hf_config(self) -> Any:
        return self.plan.hf_config

    @property
    def datasets(self) -> list[Dataset]:
        return [Dataset.of_shards(self.plan.shards)]

    @classmethod
    def trainer(cls, settings: dict[str, Any], folder: Path, device: torch.device, fingerprint: str) -> Trainer:
        from finhpc.data.shards.reader import ReplicaStream
        from finhpc.data.shards.shards import Shards
        from finhpc.data.shards.stream import ray_stream
        from finhpc.training.batches import TokenBatches
        from finhpc.training.trainer import Trainer

        config = PretrainConfig.model_validate(settings)
        shards = Shards.open(str(config.data.shards))
        shards.check_same(fingerprint)  # a restarted worker may find another folder than the run began with

        def open_stream(first_step: int, replica: int) -> Iterator[dict[str, Any]]:
            # Called by the trainer, which alone knows at which step the run resumes.
            stream = ReplicaStream(
                shards=shards,
                seq_len=config.data.seq_len,
                seed=config.train.seed,
                start_step=first_step,
                stop_step=config.train.steps,
                samples_per_step=config.parallel.samples_per_step,
                micro_batch_size=config.parallel.micro_batch_size,
                replica=replica,
                replicas=config.parallel.replicas,
            )
            return ray_stream(stream)

        hf_config = hf_config_of(config, shards)
        validation = shards.eval_samples(config.data.eval_samples, config.data.seq_len)
        return Trainer(
            config=config,
            hf_config=hf_config,
            fill=initial_fill(config, hf_config, folder),
            device=device,
            folder=folder,
            source=TokenBatches(config.parallel, open_stream, validation),
            labels={"tokenizer_sha256": shards.manifest.tokenizer_sha256, "dataset": shards.manifest.fingerprint},
        )

    def check_checkpoints(self, checkpoints: Path) -> None:
        check_tokenizer(self.config, self.plan.shards, checkpoints)

    def prepare(self, folder: Path) -> None:
        if needs_decomposing(self.config):
            with ray_cluster():
                decompose_start(self.config, folder)

    def discard_prepared(self, folder: Path) -> None:
        shutil.rmtree(folder / DECOMPOSED, ignore_errors=True)

    def counts(self) -> dict[str, Any]:
        plan = self.plan
        return {
            "params_total": plan.params_total,
            "params_trainable": plan.params_total,
            "params_dense": plan.params_dense,
            "compression_ratio": plan.compression_ratio,
            "val_unigram_entropy": plan.shards.manifest.val_unigram_entropy_nats,
            **{f"size_{bits}bit_bytes": plan.outline.stored_bytes(bits) for bits in (16, 8, 4)},
            "size_bytes": plan.outline.stored_bytes(self.config.quantization.training_bits),
        }

    def save_model(self, folder: Path, checkpoint: Checkpoint) -> None:
        from finhpc.models.folder import save_model

        self.plan.shards.check_tokenizer()  # it goes into the model's folder
        # The model that the run starts from has the same ids, and perhaps a chat template and a generation config.
        start = self.plan.init_model
        tokenizer = start.folder if start else self.plan.shards.tokenizer
        save_model(folder, self.plan.hf_config, checkpoint.tensors("param"), tokenizer)

    @property
    def model_use(self) -> str:
        train, samples = self.config.train, self.config.data.final_samples
        uses = ["scoring the model on the held-out text"] if samples else []
        return " and ".join([*uses, *(["sampling text from it"] if train.sample_tokens else [])])

    @classmethod
    def use_model(cls, settings: dict[str, Any], folder: Path, device: torch.device) -> dict[str, Any]:
        """Score `data.final_samples` held-out samples, and draw `train.sample_tokens` tokens of text."""
        config = PretrainConfig.model_validate(settings)
        scores = _final_loss(config, folder, device) if config.data.final_samples else {}
        return scores | ({"sample": _sample(config, folder, device)} if config.train.sample_tokens else {})

    def summary(self) -> list[tuple[str, str]]:
        plan = self.plan
        rows = [
            ("parameters", f"{millions(plan.params_total)}, dense {millions(plan.params_dense)}"),
            ("compression", describe_compression(plan.compression_ratio)),
        ]
        if rest := plan.params_total - plan.outline.taken(self.config.optimizer):
            own = f"{millions(plan.params_total - rest)} by {self.config.optimizer.name}"
            rows.append(("updated", f"{own}, {millions(rest)} by AdamW"))
        return rows

    def loss_note(self, result: dict[str, Any]) -> str:
        entropy, loss = self.plan.shards.manifest.val_unigram_entropy_nats, result["val_loss"]
        if loss is None:
            return ""
        where = "below" if loss <= entropy else "above"
        return f" ({abs(entropy - loss):.2f} nat {where} the unigram entropy of the same split, {entropy:.4f})"

    def memory_advice(self) -> str:
        config = self.config
        rank = f", method.rank (now {config.method.rank})" if config.method.kind != "dense" else ", use low_rank layers"
        return lower_batch(config, f", data.seq_len (now {config.data.seq_len}){rank}")


def _final_loss(config: PretrainConfig, folder: Path, device: torch.device) -> dict[str, Any]:
    """The mean loss over the final held-out samples with its standard error; each sample's goes into a CSV file.

    A sample is a block of text, and blocks are independent enough to count as single observations: the standard error
    is their standard deviation over the root of their number.
    """
    import numpy as np

    from finhpc.evaluation.sample_losses import SAMPLE_LOSSES, held_out_losses
    from finhpc.files import write_csv

    losses = held_out_losses(folder / "model", config, config.data.final_samples, device)
    write_csv(folder / SAMPLE_LOSSES, [{"sample": i, "loss": loss} for i, loss in enumerate(losses.tolist())])
    return {
        "final_val_loss": float(losses.mean()),
        "final_val_loss_se": float(losses.std(ddof=1) / np.sqrt(len(losses))) if len(losses) > 1 else None,
        "final_val_tokens": len(losses) * (config.data.seq_len - 1),
    }


def _sample(config: PretrainConfig, folder: Path, device: torch.device) -> str:
    """Text drawn from the model after `train.sample_prompt`."""
    import torch

    from finhpc.models.files.tokenizer import open_tokenizer
    from finhpc.models.files.tokens import prompt_ids
    from finhpc.models.folder import open_model

    train = config.train
    model: Any = open_model(folder / "model", device)
    tokenizer = open_tokenizer(folder / "model")
    ids = torch.tensor([prompt_ids(tokenizer, train.sample_prompt or tokenizer.eos_token)], device=device)
    room = model.config.max_position_embeddings - ids.shape[1]
    torch.manual_seed(train.seed)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max(1, min(train.sample_tokens, room)),
        do_sample=True,
        top_k=40,
        temperature=0.8,
        pad_token_id=tokenizer.eos_token_id,
    )
    return str(tokenizer.decode(out[0], skip_special_tokens=True))


def decompose_start(config: PretrainConfig, run: Path) -> None:
    """Factorize `model.path` into RUN/decomposed, continuing an interrupted one; a complete one is only checked."""
    import finhpc

    out = run / DECOMPOSED
    if (out / "result.json").is_file():  # renamed there when it was complete
        check_manifest(out)
        return
    method = config.method
    finhpc.decompose(
        finhpc.DecomposeConfig(
            model=str(config.model.path),
            out=str(out),
            rank=method.rank,
            ranks=method.ranks,
            qkv=method.qkv,
            embedding=method.embedding,
            head=method.head,
            resources=config.resources,
        )
    )
