"""The initial weights of a pretraining: random by its seed, or those of a model folder (`model.path`).

| method.kind | without a path | a dense model | a low-rank model |
|---|---|---|---|
| dense | random | continued | - |
| low_rank, cola, ... | random | - | continued, if it is of the same kind |
| svd | - | decomposed first, into RUN/decomposed | continued |
| blend | random factors, W = B A | W from it, and its factors | - |
"""

from __future__ import annotations

import os
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from finhpc.data.shards.shards import Shards
from finhpc.errors import CheckpointError, ConfigError
from finhpc.lowrank.registry import BLEND, DENSE, LAYERS, STARTED, SVD, check_kind, trained_kind
from finhpc.lowrank.replace import ranks_of
from finhpc.models.families.family import DROPOUTS
from finhpc.models.families.registry import (
    as_low_rank,
    config_of_method,
    dense_original,
    family_of,
    is_low_rank,
    resolve_shape,
)
from finhpc.models.files.config import read_config
from finhpc.models.files.manifest import check_manifest, weights_fingerprint
from finhpc.models.files.weights import open_folder
from finhpc.models.initialize import Fill, not_a_number, random_fill, weights_fill
from finhpc.settings.pretrain import Method, Model, PretrainConfig
from finhpc.training.checkpoint import list_complete

DECOMPOSED = "decomposed"  # the run folder's low-rank model, which provides the factors
SHAPE_KEYS = (
    "preset", "layers", "width", "heads", "kv_heads", "mlp_width", "context", "vocab_size", "tie_embeddings",
)  # fmt: skip
RANK_KEYS = ("rank", "ranks", "qkv", "init", "embedding", "head", "sparse_share", "lora_alpha")


@dataclass(frozen=True)
class InitModel:
    """A checked model folder with initial weights; `config` is its transformers config."""

    folder: Path
    config: Any

    @cached_property
    def fingerprint(self) -> str:
        """One hash of its config and weights, which are read: see `weights_fingerprint`."""
        return weights_fingerprint(self.folder)


def open_init_model(config: PretrainConfig, shards: Shards) -> InitModel | None:
    """Open `model.path` and check its files and its tokenizer; None if it is not set and none is needed.

    Raises `ConfigError` for settings that do not fit it, `CheckpointError` if the folder is not a complete model.
    """
    if config.model.path is None:
        if config.method.kind == BLEND and config.method.blend_weight == "frozen":
            raise ConfigError(
                f"method.kind={BLEND} with method.blend_weight=frozen takes W from a dense model, and model.path is "
                "not set; give --model.path with a dense model, or train W from scratch with "
                "method.blend_weight=trainable."
            )
        return None
    folder = Path(config.model.path)
    hf_config_of_settings(config)  # refuses settings that conflict before anything large is read
    weights = open_folder(folder, low_rank=True, floats=True)
    _check_ids(config, folder, weights.config.vocab_size, shards)
    check_manifest(folder, quickly=True)
    return InitModel(folder, weights.config)


def hf_config_of_settings(config: PretrainConfig, vocab_size: int | None = None) -> Any:
    """The transformers config of the run's model, as it is trained and saved.

    `vocab_size`: the tokenizer's. Raises `ConfigError` with every setting that does not fit, or that `model.path`
    already defines.
    """
    if config.model.path is None:
        if config.method.kind == SVD:
            raise ConfigError(
                f"method.kind={SVD} starts from a model, and model.path is not set; give --model.path with a model "
                "folder, dense or from `finhpc decompose`, or use method.kind=low_rank to start from scratch."
            )
        return config_of_method(resolve_shape(config.model, vocab_size), config.method, config.train.seed)
    initial = _read(config.model.path)
    _check_settings(config, initial)
    family_of(initial)
    if is_low_rank(initial) or config.method.kind == DENSE:
        hf_config = deepcopy(initial)
    else:
        hf_config = as_low_rank(initial, ranks_of(config.method), qkv=config.method.qkv)
    for key in DROPOUTS:
        if hasattr(hf_config, key):
            setattr(hf_config, key, config.model.dropout)
    return hf_config


def dense_config_of(config: PretrainConfig, vocab_size: int | None = None) -> Any:
    """The transformers config of the dense model that the run's model is compared with."""
    if config.model.path is None:
        return config_of_method(resolve_shape(config.model, vocab_size), Method(kind=DENSE))
    return dense_original(_read(config.model.path))


def needs_decomposing(config: PretrainConfig) -> bool:
    """Whether the run itself factorizes a dense model to initialize its low-rank layers."""
    path = config.model.path
    return path is not None and config.method.kind in STARTED and not is_low_rank(_read(path))


def initial_fill(config: PretrainConfig, hf_config: Any, run: Path) -> Fill:
    """The function that fills the modules of the run's model with their initial weights.

    A run with a complete checkpoint continues from one, or ends because all are damaged; so its initial weights, which
    a checkpoint replaces, are neither drawn nor read. Two kinds of runs need numbers before that: blends, whose
    frozen W is in no checkpoint, and training with rounded weights.
    """
    needed = config.method.kind == BLEND or config.quantization.training_bits < 16
    if not needed and list_complete(run / "checkpoints"):
        return not_a_number
    if config.model.path is None:
        return random_fill(hf_config, config.train.seed, config.method.init)
    folder = run / DECOMPOSED if needs_decomposing(config) else Path(config.model.path)
    dense = open_folder(Path(config.model.path), floats=True) if config.method.kind == BLEND else None
    return weights_fill(open_folder(folder, low_rank=True, floats=True), dense)


def _read(path: str) -> Any:
    if not os.path.isdir(path):
        raise ConfigError(f"model.path={path} is not a folder; give a model folder (of a run, or Hugging Face's).")
    return read_config(Path(path))


def _check_settings(config: PretrainConfig, initial: Any) -> None:
    """Raise `ConfigError` if the settings contradict or repeat what the model in `model.path` defines."""
    check_kind(config.method.kind)
    path, kind = config.model.path, config.method.kind
    names = [f"model.{key}" for key in SHAPE_KEYS if getattr(config.model, key) != getattr(Model(), key)]
    problems = []
    if is_low_rank(initial):
        names += [f"method.{key}" for key in RANK_KEYS if getattr(config.method, key) != getattr(Method(), key)]
        if kind == BLEND:
            problems.append(
                f"method.kind={BLEND} takes W from a dense model, and model.path={path} is low-rank; use "
                f"method.kind={SVD}, or give the dense model."
            )
        elif trained_kind(kind) != initial.low_rank_kind:
            fits = [name for name in (SVD, *LAYERS) if trained_kind(name) == initial.low_rank_kind]
            problems.append(
                f"model.path={path} is a low-rank model of method.kind={initial.low_rank_kind}, which "
                f"method.kind={kind} cannot continue; use method.kind={' or '.join(fits)}, or another model."
            )
    elif kind in LAYERS:
        problems.append(
            f"method.kind={kind} starts from scratch or from a low-rank model, and model.path={path} is dense; use "
            f"method.kind={' or '.join(STARTED)} to start from its factors, {DENSE} to go on with it, or leave the "
            "path out."
        )
    elif kind in STARTED and config.method.init not in (None, "spectral"):
        problems.append(
            f"method.init={config.method.init} conflicts with model.path={path}, whose best factors are the initial A "
            "and B; omit it."
        )
    if names:
        problems.append(
            f"{', '.join(names)} {'conflict' if len(names) > 1 else 'conflicts'} with model.path={path}, which "
            "defines the model; remove one of them."
        )
    if config.model.dropout and not hasattr(initial, "resid_pdrop"):
        problems.append(f"model.dropout={config.model.dropout} is for GPT-2 models; model.path={path} has none; use 0.")
    if problems:
        raise ConfigError(problems)


def _check_ids(config: PretrainConfig, folder: Path, vocab_size: int, shards: Shards) -> None:
    """Raise `ConfigError` if the model in `folder` has another tokenizer than the shards."""
    from tokenizers import Tokenizer

    ours, theirs = shards.tokenizer / "tokenizer.json", folder / "tokenizer.json"
    again = f"prepare the text with --tokenizer {folder}, or take another model"
    if not theirs.is_file():
        raise ConfigError(
            f"model.path={folder} has no tokenizer.json, so its ids cannot be compared with those of "
            f"data.shards={config.data.shards}; add the tokenizer that it was trained with."
        )
    if vocab_size < shards.manifest.vocab_size and vocab_size < (ids := shards.ids_of_text()):
        raise ConfigError(
            f"model.path={folder} has {vocab_size} ids, data.shards={config.data.shards} has {ids}; {again}."
        )

    def same(file: Path) -> str:
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise CheckpointError(f"{file} is not a readable tokenizer ({error}); restore it.") from None
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.post_processor = None  # adds tokens around a text: not used in shards
        return str(tokenizer.to_str())

    if ours.read_bytes() != theirs.read_bytes() and same(ours) != same(theirs):
        raise ConfigError(
            f"data.shards={config.data.shards} was made with another tokenizer than the one of model.path={folder}; "
            f"{again}."
        )
