"""transformers' Mistral (Jiang et al. 2023): Llama with a sliding window, dense and low-rank."""

from __future__ import annotations

from transformers import MistralConfig, MistralForCausalLM

from finhpc.lowrank.replace import make_low_rank
from finhpc.models.llama import llama_like


class LowRankMistralConfig(MistralConfig):
    """MistralConfig with the fields of `finhpc.models.llama.LowRankLlamaConfig`."""

    model_type = "lowrank_mistral"
    low_rank: dict[str, int | None] | None = None
    low_rank_kind: str = "low_rank"
    low_rank_layers: dict[str, int] | None = None
    factor_modules: bool = False


class LowRankMistralForCausalLM(MistralForCausalLM):
    """transformers' Mistral with its linear layers as B A."""

    config_class = LowRankMistralConfig

    def __init__(self, config: LowRankMistralConfig) -> None:
        super().__init__(config)
        make_low_rank(
            self,
            config.low_rank or {},
            config.low_rank_layers,
            kind=config.low_rank_kind,
            factor_modules=config.factor_modules,
        )


FAMILY = llama_like("mistral", MistralForCausalLM, LowRankMistralForCausalLM)
