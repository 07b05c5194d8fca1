"""The plan of a pretraining: all checks together, and everything that can be counted before the start."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finhpc.data.shards.shards import Shards
from finhpc.errors import ConfigError, collect
from finhpc.screen import counted
from finhpc.settings.pretrain import PretrainConfig
from finhpc.settings.training import TrainingConfig

if TYPE_CHECKING:
    from finhpc.planning.model import InitModel
    from finhpc.planning.outline import Outline

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """A checked pretraining: its data, model, initial weights and sizes."""

    config: PretrainConfig
    shards: Shards
    hf_config: Any
    outline: Outline
    params_dense: int
    init_model: InitModel | None = None  # the model that provides the initial weights, if there is one

    @property
    def params_total(self) -> int:
        return self.outline.params

    @property
    def compression_ratio(self) -> float:
        return self.params_dense / self.params_total


def describe_compression(ratio: float) -> str:
    """The compression ratio, with a remark if the model is larger than the dense one."""
    larger = "" if ratio >= 1 else ", larger than the dense model; a lower method.rank makes it smaller"
    return f"{ratio:.2f} x{larger}"


def hf_config_of(config: PretrainConfig, shards: Shards) -> Any:
    """The transformers config of the run's model, with the special tokens of the shards' tokenizer."""
    from finhpc.planning.model import hf_config_of_settings
    from finhpc.quantization.fake import TRAINED

    hf_config = hf_config_of_settings(config, shards.manifest.vocab_size)
    if hasattr(hf_config, TRAINED):  # from the initial model
        delattr(hf_config, TRAINED)
    hf_config.bos_token_id = hf_config.eos_token_id = shards.manifest.eot_id
    if config.quantization.when == "during":  # weights are saved before rounding
        setattr(hf_config, TRAINED, {"bits": config.quantization.bits, "scheme": config.quantization.scheme})
    return hf_config


def make_plan(config: PretrainConfig) -> Plan:
    """Check `config` with its shards and model; raises one `ConfigError` with every problem."""
    from finhpc.models.families.registry import context_of
    from finhpc.planning.model import dense_config_of, hf_config_of_settings, open_init_model
    from finhpc.planning.outline import outline_of

    problems = config.problems()
    with collect(problems):
        check_registered(config)
    shards = hf_config = init_model = None
    with collect(problems):
        if not config.data.shards:
            raise ConfigError("data.shards is not set; give the folder that `finhpc prepare --out FOLDER` wrote.")
        shards = Shards.open(config.data.shards)
    with collect(problems):  # without shards the model has the vocabulary of its preset
        hf_config = hf_config_of_settings(config) if shards is None else hf_config_of(config, shards)
    if shards is not None:
        with collect(problems):
            _check_seq_len(config, shards, None if hf_config is None else context_of(hf_config))
    if hf_config is not None:
        with collect(problems):
            check_model(config, hf_config)
        if shards is not None:
            with collect(problems):
                init_model = open_init_model(config, shards)
    if problems:
        raise ConfigError(problems)
    assert shards is not None
    if config.model.tie_embeddings and not hf_config.tie_word_embeddings:
        log.warning(
            "model.tie_embeddings=true has no effect, because the head or the embedding is low-rank; to tie them, use "
            "method.head=dense and method.embedding=dense."
        )
    seq_len, recompute = config.data.seq_len, config.train.recompute
    params_dense = outline_of(dense_config_of(config, shards.manifest.vocab_size), seq_len).params
    return Plan(config, shards, hf_config, outline_of(hf_config, seq_len, recompute), params_dense, init_model)


def check_registered(config: TrainingConfig) -> None:
    """Raise `ConfigError` if the optimizer or method is unknown, or known to this process but not to workers."""
    from finhpc.lowrank.registry import LAYERS, check_kind, trained_kind
    from finhpc.training.optimizers.registry import OPTIMIZERS, check_optimizer

    problems: list[str] = []
    with collect(problems):
        check_optimizer(config.optimizer)
        OPTIMIZERS.check_workers_see(config.optimizer.name)
    if isinstance(config, PretrainConfig):
        with collect(problems):
            check_kind(config.method.kind)
            LAYERS.check_workers_see(config.method.kind)
        layer, optimizer = LAYERS.get(trained_kind(config.method.kind)), OPTIMIZERS.get(config.optimizer.name)
        if layer and optimizer and optimizer.of_products and not layer.mergeable:
            problems.append(
                f"optimizer.name={config.optimizer.name} moves the product of A and B, which is not the whole layer of "
                f"method.kind={config.method.kind}; use another optimizer, or method.kind=low_rank."
            )
    if problems:
        raise ConfigError(problems)


def _check_seq_len(config: PretrainConfig, shards: Shards, context: int | None) -> None:
    seq_len = config.data.seq_len
    shards.check_seq_len(seq_len, context)
    if not shards.num_samples("val", seq_len):
        raise ConfigError(
            f"data.shards={config.data.shards} has no held-out sample of data.seq_len={seq_len} tokens; hold out more "
            "documents (prepare --val_fraction)."
        )


def check_stages(config: TrainingConfig, hf_config: Any) -> None:
    """Raise `ConfigError` if the transformer blocks are too few for the stages."""
    from finhpc.models.pipeline import has_halves
    from finhpc.models.schedule import most_workers

    parallel, layers, recompute = config.parallel, hf_config.num_hidden_layers, config.train.recompute
    most = most_workers(parallel.schedule, layers, has_halves(hf_config, recompute))
    if parallel.stages > most:
        blocks, use = counted(layers, "transformer block"), f"1 to {most}" if most > 1 else "1"
        how = "" if most == layers else f" with parallel.schedule=dualpipev and train.recompute={recompute}"
        raise ConfigError(f"parallel.stages={parallel.stages} does not fit {blocks}{how}; use {use}.")


def check_model(config: PretrainConfig, hf_config: Any) -> None:
    """Raise `ConfigError` if the model is too small for the stages, the samples or the ranks."""
    from finhpc.models.families.registry import FAMILIES, context_name, context_of, family_of, skeleton
    from finhpc.training.optimizers.registry import check_taken

    problems: list[str] = []
    with collect(problems):
        check_stages(config, hf_config)
    with collect(problems):
        FAMILIES.check_workers_see(family_of(hf_config).name)
    if config.data.seq_len > context_of(hf_config):
        problems.append(
            f"data.seq_len={config.data.seq_len} is longer than the model's {context_name(hf_config)}; "
            + ("lower it or raise model.context." if config.model.path is None else "lower it or take another model.")
        )
    with collect(problems):
        shapes = {name: tuple(parameter.shape) for name, parameter in skeleton(hf_config).named_parameters()}
        check_taken(config.optimizer, shapes)
    if problems:
        raise ConfigError(problems)


def check_tokenizer(config: PretrainConfig, shards: Shards, checkpoints: Path) -> None:
    """Raise `ConfigError` if the newest checkpoint was trained with another tokenizer."""
    from finhpc.training.checkpoint import list_complete

    for checkpoint in list_complete(checkpoints)[:1]:
        trained, present = checkpoint.manifest.get("tokenizer_sha256"), shards.manifest.tokenizer_sha256
        if trained and trained != present:
            raise ConfigError(
                f"data.shards={config.data.shards} was made with another tokenizer (sha256 {present[:12]}) than the "
                f"checkpoint {checkpoint.path.name} ({trained[:12]}); use the shards that the run began with, or "
                "another run.name."
            )
