"""The families finhpc knows, and what follows from one: config, skeleton, counts.

A new family is one file beside `gpt2.py` and one line here.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from finhpc.config import Recompute
from finhpc.errors import ConfigError
from finhpc.lowrank.replace import Ranks
from finhpc.models import attention, gpt2, llama
from finhpc.models.family import Family
from finhpc.models.presets import Shape

FAMILIES: dict[str, Family] = {family.name: family for family in (gpt2.FAMILY, llama.FAMILY)}

for _family in FAMILIES.values():
    _config_class = _family.low_rank_class.config_class
    AutoConfig.register(_config_class.model_type, _config_class, exist_ok=True)
    AutoModelForCausalLM.register(_config_class, _family.low_rank_class, exist_ok=True)


def family_of(config: Any) -> Family:
    """The family of a transformers config; raises `ConfigError` naming the supported ones."""
    name = str(config.model_type).removeprefix("lowrank_")
    if name not in FAMILIES:
        raise ConfigError(f"model_type={config.model_type} is not supported; supported: {', '.join(FAMILIES)}.")
    return FAMILIES[name]


def make_config(shape: Shape, ranks: Ranks, kind: str = "low_rank") -> Any:
    """transformers config of a shape; the low-rank class unless every rank is None. `kind`: `method.kind`."""
    family = FAMILIES[shape.family]
    if any(rank is not None for rank in ranks.values()):
        return family.low_rank_config(shape, ranks, kind)
    return family.dense_config(shape)


def skeleton(config: Any, recompute: Recompute = "none") -> nn.Module:
    """The whole Hugging Face model on the meta device, to be trained: names and shapes, no memory.

    It has a copy of `config`, which names its attention; `recompute` chooses one that keeps no probabilities.
    Raises `ConfigError` naming every layer that its rank does not fit.
    """
    family = family_of(config)
    config = deepcopy(config)
    low_rank = str(config.model_type).startswith("lowrank_")
    with torch.device("meta"):
        model: nn.Module = (family.low_rank_class if low_rank else family.dense_class)(config)
    model.tie_weights()  # type: ignore[operator]
    name = attention.RECOMPUTED if recompute == "attention" else attention.NAME
    model.config._attn_implementation = name  # type: ignore[union-attr]
    return model


def parameter_count(config: Any) -> int:
    """Parameters of the model, a tied matrix counted once. Takes seconds for the largest shapes."""
    return sum(parameter.numel() for parameter in skeleton(config).parameters())
