"""The families finhpc knows, and what follows from one: config, skeleton, counts.

A new family is one file like `gpt2.py` and one line here, or in a plugin (`finhpc.plugins`).
"""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from finhpc.errors import ConfigError
from finhpc.lowrank.registry import LAYERS, layers_kind
from finhpc.lowrank.replace import Ranks, layer_kind
from finhpc.models import attention
from finhpc.models.families import gpt2, llama, mistral, qwen2
from finhpc.models.families.family import Family
from finhpc.models.families.presets import Shape
from finhpc.plugins import Registry, require
from finhpc.quantization.fake import TRAINED
from finhpc.settings.training import Recompute

PLUGINS = "finhpc_plugins"  # in config.json: modules of the plugins that the model needs


def _add(name: str, family: Any) -> None:
    """Make transformers know a family's low-rank models; raises `ConfigError` where it is not named as they are."""
    if not isinstance(family, Family):
        raise ConfigError(
            f"the model family {name} must be a finhpc.models.families.family.Family, such as llama_like makes."
        )
    dense, low_rank = family.dense_class.config_class, family.low_rank_class.config_class
    if not (family.name == name == dense.model_type and low_rank.model_type == f"lowrank_{name}"):
        raise ConfigError(
            f"the model family {name} has model_type {dense.model_type} and, low-rank, {low_rank.model_type}; it must "
            f"be named as they are: {dense.model_type} and lowrank_{dense.model_type}."
        )
    AutoConfig.register(low_rank.model_type, low_rank, exist_ok=True)
    AutoModelForCausalLM.register(low_rank, family.low_rank_class, exist_ok=True)


FAMILIES: Registry[Family] = Registry(
    "the model family",
    {family.name: family for family in (gpt2.FAMILY, llama.FAMILY, mistral.FAMILY, qwen2.FAMILY)},
    _add,
)
for _name, _family in FAMILIES.own():
    _add(_name, _family)


def family_of(config: Any) -> Family:
    """The family of a transformers config; raises `ConfigError` naming the supported ones."""
    name = str(config.model_type).removeprefix("lowrank_")
    if name not in FAMILIES:
        raise ConfigError(f"model_type={config.model_type} is not supported; supported: {', '.join(FAMILIES)}.")
    return FAMILIES[name]


def context_of(config: Any) -> int:
    """The longest sequence in which every token sees all before it: the context, or a sliding window below it."""
    context, window = int(config.max_position_embeddings), int(getattr(config, "sliding_window", None) or 0)
    slides = window and "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    return min(context, window) if slides else context


def context_name(config: Any) -> str:
    """What `context_of` is, in words, such as "context of 1024"."""
    length = context_of(config)
    window = length < config.max_position_embeddings
    return f"sliding window of {length}" if window else f"context of {length}"


def with_blocks(config: Any, blocks: int) -> Any:
    """The same model with so many transformer blocks."""
    made = deepcopy(config)
    made.num_hidden_layers = blocks
    if getattr(made, "layer_types", None):
        made.layer_types = made.layer_types[:blocks]
    return made


def make_config(shape: Shape, ranks: Ranks, kind: str = "low_rank") -> Any:
    """transformers config of a shape; the low-rank class unless every rank is None. `kind`: `method.kind`."""
    family = FAMILIES[shape.family]
    if any(rank is not None for rank in ranks.values()):
        return _noted(family.low_rank_config(shape, ranks, layers_kind(kind)))
    return _noted(family.dense_config(shape))


def _noted(config: Any) -> Any:
    """With the names of the plugins that a model of this config needs to be opened."""
    origins = [FAMILIES.origin(family_of(config).name)]
    if is_low_rank(config):
        origins.append(LAYERS.origin(config.low_rank_kind))
    if needed := sorted({origin for origin in origins if origin}):
        setattr(config, PLUGINS, needed)
    return config


def check_plugins(folder: Path) -> None:
    """Raise `ConfigError` naming the plugin that the model in a folder needs and this process has not imported."""
    try:
        tree = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # whoever opens it says so
    if isinstance(tree, dict) and isinstance(needed := tree.get(PLUGINS), list):
        require(map(str, needed), f"model={folder}")


def is_low_rank(config: Any) -> bool:
    """Whether a transformers config is one of ours for low-rank models."""
    return str(config.model_type).startswith("lowrank_")


def as_low_rank(config: Any, ranks: Ranks, layers: dict[str, int] | None = None) -> Any:
    """The config of a dense model with low-rank layers; `layers`: name -> rank of single ones, before their kind's.

    Tied embeddings are untied where one of the two is low-rank.
    """
    kept = config.to_dict()
    for key in ("model_type", "architectures", "transformers_version", "dtype", "torch_dtype", "_name_or_path"):
        kept.pop(key, None)
    untied = any(ranks.get(kind) is not None for kind in ("head", "embedding")) or any(
        layer_kind(name) in ("head", "embedding") for name in layers or ()
    )
    kept["tie_word_embeddings"] = bool(config.tie_word_embeddings) and not untied
    family = family_of(config)
    tied = bool(config.tie_word_embeddings)
    made = family.low_rank_class.config_class(**kept, low_rank=ranks, low_rank_layers=layers or None, dense_tied=tied)
    made.architectures = [family.low_rank_class.__name__]
    made.dtype = "float32"
    return _noted(made)


def as_dense(config: Any) -> Any:
    """The config of the same model in transformers' own architecture; a dense model's own.

    Whether head and embedding are tied stays as it is: low-rank ones are not.
    """
    fields = ("low_rank", "low_rank_kind", "low_rank_layers", "dense_tied", "factor_modules")
    ours = {*fields, "model_type", "architectures", TRAINED, PLUGINS}
    kept = {key: value for key, value in config.to_dict().items() if key not in ours}
    return _noted(family_of(config).dense_class.config_class.from_dict(kept))


def dense_original(config: Any) -> Any:
    """`as_dense` with head and embedding tied as they were in the dense model: what a low-rank one is compared with."""
    made = as_dense(config)
    if is_low_rank(config):
        made.tie_word_embeddings = config.tie_word_embeddings or config.dense_tied
    return made


def model_sizes(config: Any, original: Any) -> dict[str, Any]:
    """`params_total` of a model, `params_dense` of the dense one that `original` is or comes from, and their ratio."""
    total, dense = parameter_count(config), parameter_count(dense_original(original))
    return {"params_total": total, "params_dense": dense, "compression_ratio": dense / total}


def skeleton(config: Any, recompute: Recompute = "none") -> nn.Module:
    """The whole Hugging Face model on the meta device, to be trained: names and shapes, no memory.

    It has a copy of `config`, which names its attention; `recompute` chooses one that keeps no probabilities.
    Raises `ConfigError` naming every layer that its rank does not fit.
    """
    family = family_of(config)
    config = deepcopy(config)
    with torch.device("meta"):
        model: nn.Module = (family.low_rank_class if is_low_rank(config) else family.dense_class)(config)
    model.tie_weights()  # type: ignore[operator]
    name = attention.RECOMPUTED if recompute == "attention" else attention.NAME
    model.config._attn_implementation = name  # type: ignore[union-attr]
    return model


def is_known(config: Any) -> bool:
    """Whether a model is of one of the families here."""
    return str(config.model_type).removeprefix("lowrank_") in FAMILIES


def whole_layers(config: Any) -> nn.Module:
    """`skeleton` of a model whose factors may be modules of their own, under the names that adapters give layers.

    The model may be of a family that transformers alone knows.
    """
    config = deepcopy(config)
    if not is_known(config):
        with torch.device("meta"):
            made: nn.Module = AutoModelForCausalLM.from_config(config)
        return made
    if getattr(config, "factor_modules", False):
        config.factor_modules = False
    return skeleton(config)


def parameter_count(config: Any) -> int:
    """Parameters of the model, a tied matrix counted once. Takes seconds for the largest shapes."""
    return sum(parameter.numel() for parameter in skeleton(config).parameters())
