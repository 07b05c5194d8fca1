"""The model families by name, and what follows from one: configs, skeletons, parameter counts."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    GemmaForCausalLM,
    GPTNeoXForCausalLM,
    GraniteForCausalLM,
    Olmo2ForCausalLM,
    Phi3ForCausalLM,
    Qwen3ForCausalLM,
    SmolLM3ForCausalLM,
    StableLmForCausalLM,
    Starcoder2ForCausalLM,
)

from finhpc.errors import ConfigError
from finhpc.lowrank.registry import LAYERS, SLTRAIN, trained_kind
from finhpc.lowrank.replace import Ranks, ranks_of
from finhpc.models import attention
from finhpc.models.families import gpt2, llama
from finhpc.models.families.described import Described
from finhpc.models.families.family import Family, LowRankConfig
from finhpc.models.families.presets import PRESETS, Shape
from finhpc.plugins import Registry, require
from finhpc.quantization.fake import TRAINED
from finhpc.settings.base import nearest
from finhpc.settings.pretrain import Method, Model, Qkv
from finhpc.settings.training import Recompute

PLUGINS = "finhpc_plugins"  # in config.json: modules of the plugins that the model needs


def _register(name: str, family: Any) -> None:
    """Register a family's low-rank classes with transformers; raises `ConfigError` if it is named differently."""
    if not isinstance(family, Family):
        raise ConfigError(
            f"the model family {name} must be a finhpc.models.families.family.Family, such as an instance of Llama."
        )
    if family.name != name:
        raise ConfigError(f"the model family {name} has model_type {family.name}; register it as {family.name}.")
    low_rank = family.low_rank_class.config_class
    AutoConfig.register(low_rank.model_type, low_rank, exist_ok=True)
    AutoModelForCausalLM.register(low_rank, family.low_rank_class, exist_ok=True)


DESCRIBED = (
    Described("Qwen3", Qwen3ForCausalLM),
    Described("Gemma", GemmaForCausalLM),
    Described("Gemma 2", Gemma2ForCausalLM),
    Described("Gemma 3", Gemma3ForCausalLM),
    Described("Phi-3", Phi3ForCausalLM, ropes=("default", "longrope", "su")),
    Described("SmolLM3", SmolLM3ForCausalLM),
    Described("OLMo 2", Olmo2ForCausalLM),
    Described("Granite", GraniteForCausalLM),
    Described("StableLM", StableLmForCausalLM),
    Described("Starcoder2", Starcoder2ForCausalLM),
    Described("GPT-NeoX", GPTNeoXForCausalLM),
)
FAMILIES: Registry[Family] = Registry(
    "the model family",
    {family.name: family for family in (gpt2.FAMILY, *llama.FAMILIES, *DESCRIBED)},
    _register,
)
for _name, _family in FAMILIES.own():
    _register(_name, _family)


def is_known(config: Any) -> bool:
    """Return whether a transformers config is of a family registered here."""
    return str(config.model_type).removeprefix("lowrank_") in FAMILIES


def family_of(config: Any) -> Family:
    """Return the family of a transformers config; raises `ConfigError` listing the supported ones."""
    if not is_known(config):
        raise ConfigError(f"model_type={config.model_type} is not supported; supported: {', '.join(FAMILIES)}.")
    return FAMILIES[str(config.model_type).removeprefix("lowrank_")]


def context_of(config: Any) -> int:
    """Return the longest sequence that is computed.

    That is the context; for families whose layers run in finhpc's own halves a shorter sliding window, in which every
    token sees all before it; and for longrope the length up to which all sequences have the same frequencies.
    """
    context, window = int(config.max_position_embeddings), int(getattr(config, "sliding_window", None) or 0)
    if family_of(config).whole_layers:
        rope = getattr(config, "rope_parameters", None) or {}
        longrope = rope.get("rope_type") == "longrope"
        return min(context, int(rope["original_max_position_embeddings"])) if longrope else context
    slides = window and "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    return min(context, window) if slides else context


def context_name(config: Any) -> str:
    """Return `context_of` in words, such as "context of 1024"."""
    length = context_of(config)
    if length == config.max_position_embeddings:
        return f"context of {length}"
    return f"{'longrope length' if family_of(config).whole_layers else 'sliding window'} of {length}"


# -- configs --------------------------------------------------------------------------------


def resolve_shape(model: Model, vocab_size: int | None = None) -> Shape:
    """Return the preset with the settings that override parts of it.

    `vocab_size` is the tokenizer's, used if the settings have none. Raises `ConfigError` with every misfit.
    """
    if model.preset not in PRESETS:
        raise ConfigError(f"model.preset={model.preset} is unknown; {nearest(model.preset, list(PRESETS))}")
    names = ("layers", "width", "heads", "kv_heads", "mlp_width", "context", "vocab_size", "tie_embeddings")
    overrides = {name: value for name in names if (value := getattr(model, name)) is not None}
    if vocab_size is not None:
        overrides.setdefault("vocab_size", vocab_size)
    shape = replace(PRESETS[model.preset], **overrides, dropout=model.dropout)
    problems = []
    if shape.width % shape.heads:
        problems.append(
            f"model.width={shape.width} is not a multiple of model.heads={shape.heads}; change one of them."
        )
    if shape.kv_heads and shape.heads % shape.kv_heads:
        problems.append(f"model.kv_heads={shape.kv_heads} does not divide model.heads={shape.heads}; use a divisor.")
    problems += FAMILIES[shape.family].shape_problems(shape)
    if vocab_size is not None and shape.vocab_size < vocab_size:
        problems.append(
            f"model.vocab_size={shape.vocab_size} is smaller than the tokenizer's {vocab_size}; "
            "leave it out or raise it."
        )
    if problems:
        raise ConfigError(problems)
    return shape


def make_config(shape: Shape, ranks: Ranks, kind: str = "low_rank", qkv: Qkv = "joint") -> Any:
    """Return the transformers config of a shape, dense if every rank is None. `kind`, `qkv`: those of `method`."""
    family = FAMILIES[shape.family]
    if any(rank is not None for rank in ranks.values()):
        return _with_plugins(family.low_rank_config(shape, ranks, trained_kind(kind), qkv))
    return _with_plugins(family.dense_config(shape))


def config_of_method(shape: Shape, method: Method, seed: int = 0) -> Any:
    """Return the transformers config of a shape made by a method; raises `ConfigError` for an unknown kind.

    `seed`: `train.seed`, which draws the places of SLTrain's sparse entries.
    """
    config = make_config(shape, ranks_of(method), method.kind, method.qkv)
    if method.kind == SLTRAIN:
        config.low_rank_sparse = {"share": method.sparse_share, "lora_alpha": method.lora_alpha, "seed": seed}
    return config


def with_blocks(config: Any, blocks: int) -> Any:
    """Return the config of the same model with another number of transformer blocks."""
    config = deepcopy(config)
    config.num_hidden_layers = blocks
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:blocks]
    return config


def is_low_rank(config: Any) -> bool:
    """Return whether a transformers config is of a low-rank model."""
    return str(config.model_type).startswith("lowrank_")


def as_low_rank(config: Any, ranks: Ranks, layers: dict[str, int] | None = None, qkv: Qkv = "joint") -> Any:
    """Return the config of a dense model with low-rank layers; `layers`: ranks by name, which override their kind's.

    `qkv`: `method.qkv`. Tied embeddings are untied if one of the two is low-rank.
    """
    family, tied = family_of(config), bool(config.tie_word_embeddings)
    tree = config.to_dict()
    for key in ("model_type", "architectures", "transformers_version", "dtype", "torch_dtype", "_name_or_path"):
        tree.pop(key, None)
    ends = ("head", "embedding")
    untied = any(ranks.get(kind) is not None for kind in ends) or any(
        family.layer_kind(name) in ends for name in layers or ()
    )
    tree["tie_word_embeddings"] = tied and not untied
    low_rank = family.low_rank_class.config_class(
        **tree, low_rank=ranks, low_rank_layers=layers or None, low_rank_qkv=qkv, dense_tied=tied
    )
    low_rank.architectures = [family.low_rank_class.__name__]
    low_rank.dtype = "float32"
    return _with_plugins(low_rank)


def as_dense(config: Any) -> Any:
    """Return the config of the same model in transformers' own architecture, tied only if the model is tied."""
    ours = {*(field.name for field in fields(LowRankConfig)), "model_type", "architectures", TRAINED, PLUGINS}
    tree = {key: value for key, value in config.to_dict().items() if key not in ours}
    return _with_plugins(family_of(config).dense_class.config_class.from_dict(tree))


def dense_original(config: Any) -> Any:
    """Return `as_dense`, tied as the dense model was: the model that a low-rank one is compared with."""
    dense = as_dense(config)
    if is_low_rank(config):
        dense.tie_word_embeddings = config.tie_word_embeddings or config.dense_tied
    return dense


def _with_plugins(config: Any) -> Any:
    """Record in a config the plugins that are needed to open a model of it."""
    origins = [FAMILIES.origin(family_of(config).name)]
    if is_low_rank(config):
        origins.append(LAYERS.origin(config.low_rank_kind))
    if needed := sorted({origin for origin in origins if origin}):
        setattr(config, PLUGINS, needed)
    return config


def check_plugins(folder: Path) -> None:
    """Raise `ConfigError` naming a plugin that the model in a folder needs and this process has not imported."""
    try:
        tree = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # reported by whoever opens the model
    if isinstance(tree, dict) and isinstance(needed := tree.get(PLUGINS), list):
        require(map(str, needed), f"model={folder}")


# -- models ---------------------------------------------------------------------------------


def skeleton(config: Any, recompute: Recompute = "none") -> nn.Module:
    """Return the whole Hugging Face model on the meta device, to be trained: names and shapes without memory.

    Its config is a copy that names finhpc's attention; with `recompute` one that stores no probabilities. A model of
    a family that only transformers knows comes as transformers builds it. Raises `ConfigError` naming every layer
    that its rank does not fit.
    """
    config = deepcopy(config)
    with torch.device("meta"):
        if not is_known(config):
            foreign: nn.Module = AutoModelForCausalLM.from_config(config)
            return foreign
        family = family_of(config)
        model: nn.Module = (family.low_rank_class if is_low_rank(config) else family.dense_class)(config)
    model.tie_weights()  # type: ignore[operator]
    name = attention.RECOMPUTED if recompute == "attention" else attention.NAME
    model.config._attn_implementation = name  # type: ignore[union-attr]
    return model


def parameter_count(config: Any) -> int:
    """Return the number of parameters, a tied matrix counted once. Takes seconds for the largest shapes."""
    return sum(parameter.numel() for parameter in skeleton(config).parameters())


def model_sizes(config: Any, original: Any) -> dict[str, Any]:
    """Return `params_total`, `params_dense` of the dense model that `original` is or comes from, and their ratio."""
    total, dense = parameter_count(config), parameter_count(dense_original(original))
    return {"params_total": total, "params_dense": dense, "compression_ratio": dense / total}
