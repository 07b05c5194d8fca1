"""transformers' Mistral (Jiang et al. 2023): Llama with a sliding window, dense and low-rank."""

from __future__ import annotations

from transformers import MistralConfig, MistralForCausalLM

from finhpc.lowrank.replace import LowRankModel
from finhpc.models.families.llama import llama_like


class LowRankMistralConfig(MistralConfig):
    """MistralConfig with the fields of `finhpc.models.families.llama.LowRankLlamaConfig`."""

    model_type = "lowrank_mistral"
    low_rank: dict[str, int | None] | None = None
    low_rank_kind: str = "low_rank"
    low_rank_layers: dict[str, int] | None = None
    dense_tied: bool = False
    factor_modules: bool = False


class LowRankMistralForCausalLM(LowRankModel, MistralForCausalLM):
    """transformers' Mistral with its linear layers as B A."""

    config_class = LowRankMistralConfig


FAMILY = llama_like("mistral", MistralForCausalLM, LowRankMistralForCausalLM)
