"""What a run starts from: numbers drawn from its seed, or the weights of a model folder (`model.path`).

| method.kind | without a path | a dense model | a low-rank model |
|---|---|---|---|
| dense | drawn | goes on | - |
| low_rank, cola | drawn | - | goes on, of the same kind |
| svd | - | decomposed first, into RUN/decomposed | goes on |
| blend | drawn, W and its factors | the same, W beside its factors | - |
"""

from __future__ import annotations

import os
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finhpc.data.shards.shards import Shards
from finhpc.errors import CheckpointError, ConfigError
from finhpc.lowrank.registry import BLEND, DENSE, LAYERS, STARTED, SVD, check_kind, layers_kind
from finhpc.lowrank.replace import ranks_of
from finhpc.models.families.presets import resolve_shape
from finhpc.models.families.registry import as_low_rank, family_of, is_low_rank, make_config
from finhpc.models.files.config import read_config
from finhpc.models.files.manifest import weights_fingerprint
from finhpc.models.files.weights import open_weights
from finhpc.models.init_from_model import stored
from finhpc.models.initialize import Fill, drawn
from finhpc.settings.pretrain import Method, Model, PretrainConfig

DECOMPOSED = "decomposed"  # the low-rank model in the run folder that the factors come from
SHAPE_KEYS = (
    "preset", "layers", "width", "heads", "kv_heads", "mlp_width", "context", "vocab_size", "tie_embeddings",
)  # fmt: skip
RANK_KEYS = ("rank", "ranks", "init", "embedding", "head")
DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout")


@dataclass(frozen=True)
class InitModel:
    """A model folder that a run starts from, checked. `config`: transformers' config of what lies there."""

    folder: Path
    config: Any
    fingerprint: str


def open_init_model(config: PretrainConfig, shards: Shards) -> InitModel | None:
    """`model.path`, once its files are as their manifest says and its ids are the shards'; None where there is none.

    Raises `ConfigError` for settings that do not go with it, `CheckpointError` where the folder is no
    whole model.
    """
    if config.model.path is None:
        return None
    folder = Path(config.model.path)
    hf_config_of_settings(config)  # refuses what does not go together before anything large is read
    weights = open_weights(folder, low_rank=True, floats=True)
    _check_ids(config, folder, weights.config.vocab_size, shards)
    return InitModel(folder, weights.config, weights_fingerprint(folder))


def hf_config_of_settings(config: PretrainConfig, vocab_size: int | None = None) -> Any:
    """transformers config of the run's model, as it is trained and saved.

    `vocab_size`: the tokeniser's. Raises `ConfigError` with every setting that does not fit, or that
    `model.path` already says.
    """
    if config.model.path is None:
        ranks = ranks_of(config.method)
        if config.method.kind == SVD:
            raise ConfigError(
                f"method.kind={SVD} starts from a model, and model.path is not set; give --model.path with a model "
                "folder, dense or from `finhpc decompose`, or use method.kind=low_rank to start from scratch."
            )
        return make_config(resolve_shape(config.model, vocab_size), ranks, config.method.kind)
    found = _read(config.model.path)
    _check(config, found)
    family_of(found)
    if is_low_rank(found) or config.method.kind == DENSE:
        made = deepcopy(found)
    else:
        made = as_low_rank(found, ranks_of(config.method))
    for key in DROPOUTS:
        if hasattr(made, key):
            setattr(made, key, config.model.dropout)
    return made


def needs_decomposing(config: PretrainConfig) -> bool:
    """Whether the run's low-rank layers come from a dense model that it factorises itself."""
    path = config.model.path
    return path is not None and config.method.kind in STARTED and not is_low_rank(_read(path))


def initial_fill(config: PretrainConfig, hf_config: Any, run: Path) -> Fill:
    """What gives the modules of the run's model their first numbers."""
    if config.model.path is None:
        return drawn(hf_config, config.train.seed, config.method.init)
    folder = run / DECOMPOSED if needs_decomposing(config) else Path(config.model.path)
    dense = open_weights(Path(config.model.path), floats=True) if config.method.kind == BLEND else None
    return stored(open_weights(folder, low_rank=True, floats=True), dense)


def _read(path: str) -> Any:
    if not os.path.isdir(path):
        raise ConfigError(f"model.path={path} is no folder; give a model folder (a run's `model`, or Hugging Face's).")
    return read_config(Path(path))


def _check(config: PretrainConfig, found: Any) -> None:
    """Raise `ConfigError` where the settings contradict the model in `model.path`, or say what it says."""
    check_kind(config.method.kind)
    path, kind = config.model.path, config.method.kind
    names = [f"model.{key}" for key in SHAPE_KEYS if getattr(config.model, key) != getattr(Model(), key)]
    problems = []
    if is_low_rank(found):
        names += [f"method.{key}" for key in RANK_KEYS if getattr(config.method, key) != getattr(Method(), key)]
        if kind == BLEND:
            problems.append(
                f"method.kind={BLEND} takes W from a dense model, and model.path={path} is low-rank; use "
                f"method.kind={SVD}, or give the dense model."
            )
        elif layers_kind(kind) != found.low_rank_kind:
            fits = [name for name in (SVD, *LAYERS) if layers_kind(name) == found.low_rank_kind]
            problems.append(
                f"model.path={path} is a low-rank model of method.kind={found.low_rank_kind}, which method.kind={kind} "
                f"does not go on from; use method.kind={' or '.join(fits)}, or another model."
            )
    elif kind in LAYERS:
        problems.append(
            f"method.kind={kind} starts from scratch or from a low-rank model, and model.path={path} is dense; use "
            f"method.kind={' or '.join(STARTED)} to start from its factors, {DENSE} to go on with it, or leave the "
            "path out."
        )
    elif kind in STARTED and config.method.init not in (None, "spectral"):
        problems.append(
            f"method.init={config.method.init} does not go with model.path={path}, whose best factors A and B start "
            "as; leave it out."
        )
    if names:
        problems.append(
            f"{', '.join(names)} {'are' if len(names) > 1 else 'is'} set beside model.path={path}, which brings its "
            "own; leave one of the two out."
        )
    if config.model.dropout and not hasattr(found, "resid_pdrop"):
        problems.append(f"model.dropout={config.model.dropout} is for GPT-2 models; model.path={path} has none; use 0.")
    if problems:
        raise ConfigError(problems)


def _check_ids(config: PretrainConfig, folder: Path, vocab_size: int, shards: Shards) -> None:
    """Raise `ConfigError` unless the model in `folder` reads the shards' ids as they were written."""
    from tokenizers import Tokenizer

    ours, theirs = shards.tokenizer / "tokenizer.json", folder / "tokenizer.json"
    again = f"prepare the text with --tokenizer {folder}, or take another model"
    if not theirs.is_file():
        raise ConfigError(
            f"model.path={folder} holds no tokenizer.json, so nothing says that its ids are those of "
            f"data.shards={config.data.shards}; add the tokeniser that it was trained with."
        )
    if vocab_size < shards.manifest.vocab_size and vocab_size < (ids := shards.ids_of_text()):
        raise ConfigError(
            f"model.path={folder} knows {vocab_size} ids, data.shards={config.data.shards} has {ids}; {again}."
        )

    def same(file: Path) -> str:
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise CheckpointError(f"{file} is no readable tokeniser ({error}); restore it.") from None
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.post_processor = None  # adds tokens around a text: not used in shards
        return str(tokenizer.to_str())

    if ours.read_bytes() != theirs.read_bytes() and same(ours) != same(theirs):
        raise ConfigError(
            f"data.shards={config.data.shards} was made with another tokeniser than the model in model.path={folder} "
            f"reads; {again}."
        )
