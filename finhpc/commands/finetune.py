"""`finhpc finetune`: examples and a frozen base -> an adapter in peft's format, resumable at any moment."""

from __future__ import annotations

import logging
import math
import shutil
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finhpc.errors import ConfigError, DataError, collect
from finhpc.files import file_sha256, json_sha256, publish
from finhpc.planning.plan import check_registered, check_stages
from finhpc.runs.job import Job
from finhpc.runs.result import lower_batch, millions
from finhpc.runs.run import mlflow_checked, run
from finhpc.settings.finetune import FinetuneConfig
from finhpc.tracking.describe import Dataset
from finhpc.training.checkpoint import Checkpoint

if TYPE_CHECKING:
    import torch

    from finhpc.data.examples.batches import Batches
    from finhpc.data.examples.examples import Examples
    from finhpc.models.files.weights import Weights
    from finhpc.training.trainer import Begin, Evaluate, Trainer

log = logging.getLogger(__name__)

# In the run folder:
EXAMPLES = "examples.safetensors"  # the examples that the workers read
F1 = "val_weighted_f1"  # a metric of evaluations, of label answers
QUANTIZED = "quantized"  # a link to the base that a sweep quantized for its trials


def finetune(config: FinetuneConfig) -> dict[str, Any]:
    """Train an adapter and return the content of `result.json` (FinGPT-HPC, section V; FinLoRA).

    The same `run.name` and `run.storage` resume; a finished run returns its result at once. Raises
    `ConfigError` for settings that cannot work, `DataError` for damaged examples, `TrainingFailedError` or another
    `FinhpcError` when training fails.
    """
    return run(mlflow_checked(Finetune(config)))


class Finetune(Job):
    """Train an adapter on examples, over a frozen base.

    `base`: its weights and tokenizer; `lora_model`: the base with adapters; `config`: the settings, with the number of
    steps.
    """

    command = "finetune"

    def __init__(self, config: FinetuneConfig) -> None:
        """Check everything together; raises one `ConfigError` with every problem."""
        from finhpc.data.examples.examples import make_examples, read_sources
        from finhpc.models.files.manifest import check_manifest
        from finhpc.models.files.source import tokenizer_of
        from finhpc.models.files.tokens import check_rows
        from finhpc.models.lora.adapter_file import check_base
        from finhpc.models.lora.model import LoraModel
        from finhpc.training.finetuning.eva import check_inputs
        from finhpc.training.optimizers.registry import check_taken

        config = config.model_copy(deep=True)
        problems = config.problems()
        with collect(problems):
            check_registered(config)
        base: Weights | None = None
        tokenizer: Any = None
        with collect(problems):
            base = open_base(config)
            check_manifest(base.path, quickly=True)
        if base is not None:
            config.model.path = str(base.path.absolute())
            with collect(problems):
                _check_model(config, base)
            with collect(problems):
                self.lora_model = LoraModel.of(config, base)
                check_taken(config.optimizer, self.lora_model.adapter_shapes)
                if config.lora.path is not None:
                    check_base(Path(config.lora.path), base.path)
            with collect(problems):
                tokenizer = tokenizer_of(base.path)
                check_rows(tokenizer, base.config.vocab_size, f"model.path={base.path}")
        with collect(problems):
            if tokenizer is None:
                read_sources(config.data)  # for its problems
            else:
                earlier = Path(config.run.storage) / config.run.name / EXAMPLES
                self.examples = make_examples(config.data, tokenizer, config.train.seed, earlier)
                packing = batches_of(config, self.examples)  # for its problems
                if config.lora.init == "eva":
                    check_inputs(self.examples.train, packing, config.lora.rank)
                _set_steps(config, len(self.examples.train))
                _check_scored(config, self.examples)
        if problems:
            raise ConfigError(problems)
        assert base is not None
        self.config: FinetuneConfig = config
        self.base, self.tokenizer = base, tokenizer

    @cached_property
    def base_fingerprint(self) -> str:
        """One hash of the base's config and weights, all of which are read if they changed since they were hashed."""
        from finhpc.models.files.manifest import weights_fingerprint

        return weights_fingerprint(self.base.path)

    @property
    def params_base(self) -> int:
        return sum(parameter.numel() for parameter in self.base.skeleton.parameters())

    @property
    def params_trainable(self) -> int:
        return sum(math.prod(shape) for shape in self.lora_model.adapter_shapes.values())

    @property
    def fingerprints(self) -> tuple[str, str | None]:
        from finhpc.models.lora.peft_format import TENSORS

        start = self.config.lora.path
        if start is None:
            return self.examples.fingerprint, self.base_fingerprint
        return self.examples.fingerprint, json_sha256([self.base_fingerprint, file_sha256(Path(start) / TENSORS)])

    @property
    def hf_config(self) -> Any:
        return self.base.config

    @property
    def datasets(self) -> list[Dataset]:
        data, sha256 = self.config.data, self.examples.fingerprint
        training = [Dataset.of_file(source, sha256) for source in data.source]
        return training + [Dataset.of_file(source, sha256, "evaluation") for source in data.eval_source]

    def prepare(self, folder: Path) -> None:
        for note in self.examples.notes:
            log.info(note)
        self.examples.save(folder / EXAMPLES)

    def discard_prepared(self, folder: Path) -> None:
        (folder / EXAMPLES).unlink(missing_ok=True)

    @classmethod
    def trainer(cls, settings: dict[str, Any], folder: Path, device: torch.device, fingerprint: str) -> Trainer:
        from finhpc.data.examples.choices.candidates import Candidates, candidates_of
        from finhpc.data.examples.choices.preferences import Preferences
        from finhpc.evaluation.label_scores import HeldOutScore
        from finhpc.models.lora.model import LoraModel
        from finhpc.training import held_out
        from finhpc.training.finetuning import choices
        from finhpc.training.finetuning.batches import PackedBatches
        from finhpc.training.finetuning.best import Best
        from finhpc.training.finetuning.eva import begin_with_inputs
        from finhpc.training.finetuning.reference import begin_with_reference
        from finhpc.training.trainer import Trainer

        config = FinetuneConfig.model_validate(settings)
        base = open_base(config)
        quantized = folder / QUANTIZED
        examples, train = _open_examples(folder, fingerprint), config.train
        packing = batches_of(config, examples)
        labels = Candidates(candidates_of(examples)) if train.best_by == F1 else None
        source = PackedBatches(examples, packing, config.data.eval_limit, labels)
        score = HeldOutScore(examples, labels.answers) if labels else None
        evaluate: Evaluate = partial(choices.evaluate, score=score) if score else held_out.evaluate
        begin: list[Begin] = [partial(begin_with_inputs, source=source)] if config.lora.init == "eva" else []
        if isinstance(packing.candidates, Preferences):
            begin.append(partial(begin_with_reference, source=source, folder=folder))
            evaluate = choices.evaluate_pairs
            if any((folder / "checkpoints").glob("step_*")):
                packing.candidates.load(folder)
        return Trainer(
            config=config,
            hf_config=base.config,
            fill=None,
            device=device,
            folder=folder,
            source=source,
            lora_model=LoraModel.of(config, base, quantized if quantized.is_dir() else None),
            labels={"dataset": fingerprint},
            begin=begin,
            best=Best(train.best_by, train.patience) if train.best_by else None,
            evaluate=evaluate,
        )

    def counts(self) -> dict[str, Any]:
        from finhpc.models.families.registry import dense_original, parameter_count

        total, dense = self.params_base + self.params_trainable, parameter_count(dense_original(self.base.config))
        return {
            "params_total": total,
            "params_trainable": self.params_trainable,
            "params_dense": dense,
            "compression_ratio": dense / total,
            "data": self.examples.counts,
            "scores": None,
            "held_out_weighted_f1": None,
        }

    def save_model(self, folder: Path, checkpoint: Checkpoint) -> None:
        from finhpc.models.files.source import copy_tokenizer
        from finhpc.models.files.tokens import end_of_turn, write_stops
        from finhpc.models.lora.peft_format import save_adapter

        adapters = dict(checkpoint.tensors("param"))
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        config, base = self.config, self.base
        save_adapter(partial, config.lora, adapters, base, config.quantization, self.base_fingerprint)
        copy_tokenizer(base.path, partial)
        # Tokens that end the answers it learned, at which generation stops, here and elsewhere.
        chats = any(source["template"] == "chat" for source in self.examples.counts["by_source"])
        stops = [self.tokenizer.eos_token_id, end_of_turn(self.tokenizer) if chats else None]
        write_stops(partial, [token for token in stops if token is not None], base.config)
        publish(partial, folder, over=True)

    @property
    def model_use(self) -> str:
        from finhpc.evaluation.label_scores import labeled

        number = len(labeled(self.examples, self.config.data.eval_limit)[0])
        return f"choosing labels for {number:,} held-out examples" if number else ""

    @classmethod
    def use_model(cls, settings: dict[str, Any], folder: Path, device: torch.device) -> dict[str, Any]:
        """Score the labels of held-out examples, as `finhpc evaluate` would with the adapter on its base."""
        from finhpc.data.examples.examples import load
        from finhpc.evaluation.label_scores import label_scores, mean_weighted_f1
        from finhpc.evaluation.models import load_for_evaluation
        from finhpc.models.files.source import tokenizer_of

        config = FinetuneConfig.model_validate(settings)
        assert config.model.path is not None
        dtype = "bfloat16" if config.train.precision == "bf16" else "float32"
        # The adapter stays apart from the base: added to weights of 16 bits, most of it would be rounded away.
        model, _ = load_for_evaluation(config.model.path, str(folder / "model"), dtype, str(device))
        tokenizer, examples = tokenizer_of(Path(config.model.path)), load(folder / EXAMPLES)
        scores = label_scores(model, tokenizer, examples, config.data.eval_limit)
        return {"scores": scores, "held_out_weighted_f1": mean_weighted_f1(scores)}

    def summary(self) -> list[tuple[str, str]]:
        counts, bits = self.examples.counts, self.config.quantization.bits
        share = self.params_trainable / self.params_base
        return [
            ("base", f"{self.base.path}, {millions(self.params_base)} parameters at {bits} bits"),
            ("trained parameters", f"{self.params_trainable:,} ({share:.2%} of the base's)"),
            ("examples", f"{counts['examples']:,} trained on, {counts['held_out']:,} held out"),
        ]

    def loss_note(self, result: dict[str, Any]) -> str:
        scores = [f"{name} {score['weighted_f1']:.3f}" for name, score in (result.get("scores") or {}).items()]
        return f"; weighted F1 of held-out labels: {', '.join(scores)}" if scores else ""

    def memory_advice(self) -> str:
        config = self.config
        bits = "" if config.quantization.bits == 4 else f", quantization.bits (now {config.quantization.bits})"
        full = "" if config.train.recompute == "full" else ", use train.recompute=full"
        return lower_batch(config, f", data.max_len (now {config.data.max_len}){bits}{full}")


def batches_of(config: FinetuneConfig, examples: Examples) -> Batches:
    """Return how the run's examples are packed into batches.

    Raises `ConfigError` if they have no labels to choose, or are pairs without `data.loss=preferences`.
    """
    from finhpc.data.examples.batches import Batches
    from finhpc.data.examples.choices.candidates import Candidates
    from finhpc.data.examples.choices.preferences import Preferences, check_loss

    check_loss(config.data, examples)
    candidates: Candidates | Preferences | None = None
    if config.data.loss == "labels":
        candidates = Candidates.of(config.data, examples)
    if config.data.loss == "preferences":
        candidates = Preferences.of(config.data)
    return Batches(config.parallel, config.train.seed, share_prefix=not config.lora.dropout, candidates=candidates)


def open_base(config: FinetuneConfig) -> Weights:
    """Open the base in `model.path`; raises `ConfigError` or `CheckpointError` if it cannot be used."""
    from finhpc.models.files.source import locate, open_weights

    if not config.model.path:
        raise ConfigError("model.path is not set; give the base: a Hugging Face folder, a hub id or a .gguf file.")
    return open_weights(locate(config.model.path), low_rank=True)


def _check_model(config: FinetuneConfig, base: Weights) -> None:
    from finhpc.models.families.registry import FAMILIES, context_name, context_of, family_of

    problems: list[str] = []
    with collect(problems):
        check_stages(config, base.config)
    with collect(problems):
        FAMILIES.check_workers_see(family_of(base.config).name)
    if config.train.compile == "on" and family_of(base.config).whole_layers:
        problems.append(
            f"train.compile=on does not fit packs of {family_of(base.config).label} models, whose layers run as "
            "transformers has them; use train.compile=off."
        )
    if config.data.max_len > context_of(base.config):
        problems.append(
            f"data.max_len={config.data.max_len} is longer than the {context_name(base.config)} that model.path="
            f"{config.model.path} has; lower it."
        )
    if problems:
        raise ConfigError(problems)


def _set_steps(config: FinetuneConfig, examples: int) -> None:
    """Set `train.steps` from `train.epochs`, unless it was given."""
    train = config.train
    if train.epochs is None:
        return
    steps = max(1, round(train.epochs * examples / config.parallel.samples_per_step))
    if "steps" in train.model_fields_set and train.steps != steps:
        if "epochs" in train.model_fields_set:
            raise ConfigError(
                f"train.steps={train.steps} and train.epochs={train.epochs:g} ({steps} steps of "
                f"{config.parallel.samples_per_step} examples) contradict each other; leave one out."
            )
        train.epochs = None  # the user set the steps
        return
    train.steps = steps


def _check_scored(config: FinetuneConfig, examples: Examples) -> None:
    """Raise `ConfigError` if the best evaluation is asked for by a metric that the data cannot give."""
    from finhpc.evaluation.label_scores import labeled

    by = config.train.best_by
    if by == F1 and len(examples.held_out) and not labeled(examples, config.data.eval_limit)[0]:
        raise ConfigError(
            f"train.best_by={by} scores labels, and the answers of the held-out examples are texts; use "
            "train.best_by=val_loss."
        )
    if by is not None and not len(examples.held_out):
        raise ConfigError(
            f"train.best_by={by} compares evaluations, and no examples are held out "
            f"(data.eval_fraction={config.data.eval_fraction:g}); raise data.eval_fraction, give data.eval_source, or "
            "leave train.best_by out."
        )


def _open_examples(folder: Path, fingerprint: str) -> Examples:
    """The run's examples, as `prepare` wrote them; raises `DataError` if they are not those the run began with."""
    from finhpc.data.examples.examples import load

    examples = load(folder / EXAMPLES)
    if examples.fingerprint != fingerprint:
        raise DataError(
            f"{folder / EXAMPLES} has other examples than the run began with; remove it and run the same command again."
        )
    return examples
