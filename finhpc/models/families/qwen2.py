"""transformers' Qwen2 (Yang et al. 2024): Llama with biases on queries, keys and values, dense and low-rank."""

from __future__ import annotations

from transformers import Qwen2Config, Qwen2ForCausalLM

from finhpc.lowrank.replace import LowRankModel
from finhpc.models.families.llama import llama_like


class LowRankQwen2Config(Qwen2Config):
    """Qwen2Config with the fields of `finhpc.models.families.llama.LowRankLlamaConfig`."""

    model_type = "lowrank_qwen2"
    low_rank: dict[str, int | None] | None = None
    low_rank_kind: str = "low_rank"
    low_rank_layers: dict[str, int] | None = None
    dense_tied: bool = False
    factor_modules: bool = False


class LowRankQwen2ForCausalLM(LowRankModel, Qwen2ForCausalLM):
    """transformers' Qwen2 with its linear layers as B A."""

    config_class = LowRankQwen2Config


FAMILY = llama_like("qwen2", Qwen2ForCausalLM, LowRankQwen2ForCausalLM)
