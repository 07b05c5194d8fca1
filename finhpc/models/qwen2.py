"""transformers' Qwen2 (Yang et al. 2024): Llama with biases on queries, keys and values, dense and low-rank."""

from __future__ import annotations

from transformers import Qwen2Config, Qwen2ForCausalLM

from finhpc.lowrank.replace import make_low_rank
from finhpc.models.llama import llama_like


class LowRankQwen2Config(Qwen2Config):
    """Qwen2Config with the fields of `finhpc.models.llama.LowRankLlamaConfig`."""

    model_type = "lowrank_qwen2"
    low_rank: dict[str, int | None] | None = None
    low_rank_kind: str = "low_rank"
    low_rank_layers: dict[str, int] | None = None
    factor_modules: bool = False


class LowRankQwen2ForCausalLM(Qwen2ForCausalLM):
    """transformers' Qwen2 with its linear layers as B A."""

    config_class = LowRankQwen2Config

    def __init__(self, config: LowRankQwen2Config) -> None:
        super().__init__(config)
        make_low_rank(
            self,
            config.low_rank or {},
            config.low_rank_layers,
            kind=config.low_rank_kind,
            factor_modules=config.factor_modules,
        )


FAMILY = llama_like("qwen2", Qwen2ForCausalLM, LowRankQwen2ForCausalLM)
