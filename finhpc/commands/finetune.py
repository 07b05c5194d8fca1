"""`finhpc finetune`: examples and a frozen base -> an adapter in peft's format, resumable at any moment."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finhpc.cluster.connect import use_cuda
from finhpc.errors import ConfigError, DataError, collect
from finhpc.files import publish
from finhpc.planning.plan import check_parallel, check_parts, check_stages
from finhpc.runs import result as outcome
from finhpc.runs.job import Job, Rows
from finhpc.runs.run import checked, run
from finhpc.screen import rows_table, summary_table
from finhpc.settings.finetune import FinetuneConfig
from finhpc.tracking.shown import Dataset
from finhpc.training.checkpoint import Checkpoint, read_stage

if TYPE_CHECKING:
    import torch

    from finhpc.data.examples.examples import Examples
    from finhpc.models.files.weights import Weights
    from finhpc.models.lora.model import LoraModel
    from finhpc.training.trainer import Trainer

log = logging.getLogger(__name__)

EXAMPLES = "examples.safetensors"  # in the run folder: what the workers read
QUANTIZED = "quantized"  # there too, a link: the base that a sweep quantised for its trials


def finetune(config: FinetuneConfig, dry_run: bool = False) -> dict[str, Any]:
    """Train an adapter as `config` says and return the content of `result.json`.

    FinGPT-HPC, section V; FinLoRA. The same `run.name` and `run.storage` resume; a finished run returns its
    result at once. With `dry_run` everything is checked and counted, and nothing starts. Raises `ConfigError`
    for settings that cannot work, `DataError` for damaged examples, `TrainingFailedError` or another
    `FinhpcError` when training fails.
    """
    return run(checked(Finetune(config)), dry_run)


class Finetune(Job):
    """Examples and a base -> an adapter."""

    verb = "finetune"

    def __init__(self, config: FinetuneConfig) -> None:
        config = config.model_copy(deep=True)
        self.made = _make(config)
        self.config: FinetuneConfig = self.made.config

    @property
    def fingerprints(self) -> tuple[str, str | None]:
        return self.made.examples.fingerprint, self.made.base_fingerprint

    @property
    def hf_config(self) -> Any:
        return self.made.weights.config

    @property
    def datasets(self) -> list[Dataset]:
        data, read = self.config.data, self.made.examples
        learned = [Dataset.of_file(source, read.fingerprint) for source in data.source]
        return learned + [Dataset.of_file(source, read.fingerprint, "evaluation") for source in data.eval_source]

    @classmethod
    def trainer(cls, settings: dict[str, Any], folder: Path, device: torch.device, fingerprint: str) -> Trainer:
        from finhpc.models.lora.model import LoraModel
        from finhpc.training.batches import PackedBatches
        from finhpc.training.trainer import Trainer

        config = FinetuneConfig.model_validate(settings)
        weights = open_base(config)
        quantized = folder / QUANTIZED
        return Trainer(
            config=config,
            hf_config=weights.config,
            fill=None,
            device=device,
            folder=folder,
            batches=PackedBatches(open_examples(folder, fingerprint), batches_of(config), config.data.eval_limit),
            adapt=LoraModel.of(config, weights, quantized if quantized.is_dir() else None),
            labels={"dataset": fingerprint},
        )

    def make_ready(self, folder: Path) -> None:
        for note in self.made.examples.notes:
            log.info(note)
        self.made.examples.save(folder / EXAMPLES)

    def forget(self, folder: Path) -> None:
        (folder / EXAMPLES).unlink(missing_ok=True)

    def counts(self) -> dict[str, Any]:
        from finhpc.models.families.registry import dense_original, parameter_count

        made = self.made
        total = made.params_base + made.params_trainable
        dense = parameter_count(dense_original(made.weights.config))
        return {
            "params_total": total,
            "params_trainable": made.params_trainable,
            "params_dense": dense,
            "compression_ratio": dense / total,
            "data": made.examples.counts,
            "scores": None,
            "held_out_weighted_f1": None,
        }

    @property
    def vocab_size(self) -> int:
        return int(self.made.weights.config.vocab_size)

    def save_model(self, folder: Path, saved: Checkpoint) -> None:
        from finhpc.models.files.tokens import write_stops
        from finhpc.models.lora.peft_format import save_adapter

        trained = {name: tensor for file in saved.stage_files() for name, tensor in read_stage(file, "param").items()}
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        made, config = self.made, self.config
        save_adapter(partial, config.lora, trained, made.weights, config.quantization, made.base_fingerprint)
        made.weights.save_tokenizer(partial)
        write_stops(partial, self._ends(), made.weights.config)
        publish(partial, folder, over=True)

    def _ends(self) -> list[int]:
        """Ids that end the answers it learned: generation stops at them, here and elsewhere."""
        from finhpc.models.files.tokens import end_of_turn

        tokenizer = tokenizer_of(self.made.weights)
        chats = any(source["format"] == "chat" for source in self.made.examples.counts["by_source"])
        ends = [tokenizer.eos_token_id, end_of_turn(tokenizer) if chats else None]
        return [token for token in ends if token is not None]

    def finish(self, result: dict[str, Any], folder: Path) -> None:
        """Score the labels of held-out examples, on this process alone."""
        import torch

        from finhpc.evaluation.label_scores import label_scores
        from finhpc.models.loading import load_model

        config = self.config
        weights = self.made.weights
        torch.set_num_threads(config.resources.threads)
        model = load_model(folder / "model", torch.bfloat16 if config.train.precision == "bf16" else torch.float32)
        tokenizer = tokenizer_of(weights)
        scores = label_scores(model, tokenizer, self.made.examples, config.data.eval_limit)
        if scores:
            n = sum(score["n"] for score in scores.values())
            result["scores"] = scores
            result["held_out_weighted_f1"] = sum(s["weighted_f1"] * s["n"] for s in scores.values()) / n

    def remark(self, result: dict[str, Any]) -> str:
        scores = result.get("scores") or {}
        said = [f"{name} {score['weighted_f1']:.3f}" for name, score in scores.items()]
        return f"; weighted F1 of held-out labels: {', '.join(said)}" if said else ""

    def rows(self) -> Rows:
        made, counts = self.made, self.made.examples.counts
        bits = self.config.quantization.bits
        trained = f"{made.params_trainable:,} ({made.params_trainable / made.params_base:.2%} of the base's)"
        return [
            ("base", f"{made.weights.path}, {outcome.millions(made.params_base)} parameters at {bits} bits"),
            ("trained parameters", trained),
            ("examples", f"{counts['examples']:,} trained on, {counts['held_out']:,} held out"),
        ]

    def dry_run(self, total: dict[str, float] | None) -> dict[str, Any]:
        from finhpc.commands.estimate.finetuning import of_examples
        from finhpc.commands.estimate.tables import plan_summary, stage_rows
        from finhpc.training.batches import PackedBatches

        config, made = self.config, self.made
        for note in made.examples.notes:
            log.info(note)
        result = outcome.counted(self) | {"status": "dry_run", "steps": config.train.steps}
        batches = batches_of(config)
        result["tokens"] = PackedBatches(made.examples, batches).tokens(config.train.steps)
        cuda = use_cuda(config, total) if total else config.resources.device == "cuda"
        numbers = of_examples(config, made.lora_model, made.examples, batches, cuda, here=total is not None)
        result["estimate"] = numbers
        rows = [("tokens", f"{result['tokens']:,}"), *plan_summary(numbers, config.train.steps)]
        summary_table(f"dry run of {config.run.name}", outcome.dry_summary(self) + rows)
        rows_table("memory per worker by stage in GB, estimated", stage_rows(numbers["stages"]))
        return result

    def memory_advice(self) -> str:
        config = self.config
        fewer = "" if config.quantization.bits == 4 else f", quantization.bits (now {config.quantization.bits})"
        full = "" if config.train.recompute == "full" else ", use train.recompute=full"
        return outcome.lower_batch(config, f", data.max_len (now {config.data.max_len}){fewer}{full}")


@dataclass(frozen=True)
class Made:
    """A checked finetuning: settings with the number of steps, the base, the examples."""

    config: FinetuneConfig
    weights: Weights
    base_fingerprint: str
    lora_model: LoraModel
    examples: Examples

    @property
    def params_base(self) -> int:
        return sum(parameter.numel() for parameter in self.weights.skeleton.parameters())

    @property
    def params_trainable(self) -> int:
        return sum(self.config.lora.rank * sum(shape) for shape in self.lora_model.targets.values())


def batches_of(config: FinetuneConfig) -> Any:
    """How the run's examples become packs."""
    from finhpc.data.examples.batches import Batches

    return Batches(config.parallel, config.train.seed, share_prefix=not config.lora.dropout)


def open_base(config: FinetuneConfig) -> Weights:
    """The base in `model.path`, located; raises `ConfigError` or `CheckpointError` where it cannot be used."""
    from finhpc.models.files.weights import locate, open_weights

    if not config.model.path:
        raise ConfigError("model.path is not set; give the base: a Hugging Face folder, a hub id or a .gguf file.")
    return open_weights(locate(config.model.path), low_rank=True)


def _make(config: FinetuneConfig) -> Made:
    """Check everything together; raises one `ConfigError` with every problem."""
    from finhpc.data.examples.examples import make_examples
    from finhpc.models.files.tokens import check_rows
    from finhpc.models.lora.model import LoraModel

    problems: list[str] = []
    weights = lora_model = examples = tokenizer = None
    with collect(problems):
        check_parallel(config)
    with collect(problems):
        check_parts(config)
    with collect(problems):
        weights = open_base(config)
    if weights is not None:
        config.model.path = str(weights.path.absolute())
        with collect(problems):
            _check_model(config, weights)
        with collect(problems):
            lora_model = LoraModel.of(config, weights)
        with collect(problems):
            tokenizer = tokenizer_of(weights)
            check_rows(tokenizer, weights.config.vocab_size, f"model.path={weights.path}")
    if weights is not None and tokenizer is not None:
        with collect(problems):
            before = Path(config.run.storage) / config.run.name / EXAMPLES
            examples = make_examples(config.data, tokenizer, config.train.seed, before)
    if examples is not None:
        with collect(problems):
            _set_steps(config, len(examples.train))
    if problems:
        raise ConfigError(problems)
    assert weights is not None
    assert lora_model is not None
    assert examples is not None
    return Made(config, weights, base_fingerprint(weights.path), lora_model, examples)


def _check_model(config: FinetuneConfig, weights: Weights) -> None:
    from finhpc.models.families.registry import FAMILIES, context_name, context_of, family_of

    problems: list[str] = []
    with collect(problems):
        check_stages(config, weights.config)
    with collect(problems):
        FAMILIES.check_workers_see(family_of(weights.config).name)
    if config.data.max_len > context_of(weights.config):
        problems.append(
            f"data.max_len={config.data.max_len} is longer than the {context_name(weights.config)} that model.path="
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
        train.epochs = None  # steps were asked for
        return
    train.steps = steps


def tokenizer_of(weights: Weights) -> Any:
    """The base's tokeniser; raises `ConfigError` where the model comes without."""
    from finhpc.models.files.tokenizer import open_tokenizer

    return open_tokenizer(weights.path)


def base_fingerprint(path: Path) -> str:
    """One hash of the base, whose files are checked against their manifest where there is one."""
    from finhpc.models.files.manifest import weights_fingerprint

    return weights_fingerprint(path)


def open_examples(folder: Path, fingerprint: str) -> Examples:
    """The run's examples, as its workers read them; raises `DataError` where they are others."""
    from finhpc.data.examples.examples import load

    examples = load(folder / EXAMPLES)
    if examples.fingerprint != fingerprint:
        raise DataError(f"{folder / EXAMPLES} holds other examples than the run began with; remove it and run again.")
    return examples
