"""vLLM's plug-in: it opens low-rank models with their factors, which a pass then reads instead of the dense matrices.

vLLM calls `register` in each of its processes, because `pyproject.toml` names it in the entry points of the group
`vllm.general_plugins`. Nothing else of finhpc imports vLLM.
"""

from __future__ import annotations

from typing import Any

from finhpc.models.families.family import Family
from finhpc.models.families.registry import FAMILIES

FAMILY_NAMES = ("gpt2", "llama", "mistral", "qwen2")  # others scale or cap logits, which vLLM does in their own classes
MODEL = "finhpc.models.vllm.model:LowRankForCausalLM"  # a name, so that vLLM imports it in the process that needs it


def register() -> None:
    """Register the low-rank models of `FAMILY_NAMES` with vLLM and with transformers' `AutoModel`."""
    from transformers import AutoModel
    from vllm import ModelRegistry

    for family in map(FAMILIES.__getitem__, FAMILY_NAMES):
        body = _body_class(family)
        AutoModel.register(body.config_class, body, exist_ok=True)
        ModelRegistry.register_model(family.low_rank_class.__name__, MODEL)


def _body_class(family: Family) -> Any:
    """Return what vLLM makes a model's body with: everything but the head, which it computes itself."""

    def _from_config(cls: type[Any], /, config: Any, **how: Any) -> Any:
        from finhpc.models.vllm.model import body

        return body(family.low_rank_class._from_config(config, **how))

    names = {"config_class": family.low_rank_class.config_class, "_from_config": classmethod(_from_config)}
    return type(f"{family.low_rank_class.__name__}Body", (), names)
