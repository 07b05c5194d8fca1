"""Qwen2 (Yang et al. 2024): Llama with biases on queries, keys and values."""

from __future__ import annotations

from typing import Any

from transformers import Qwen2Config, Qwen2ForCausalLM

from finhpc.models.families.family import LowRankConfig, LowRankModel
from finhpc.models.families.llama import Llama


class LowRankQwen2Config(LowRankConfig, Qwen2Config):
    model_type = "lowrank_qwen2"


class LowRankQwen2ForCausalLM(LowRankModel, Qwen2ForCausalLM):
    config_class = LowRankQwen2Config


class Qwen2(Llama):
    def layer_types(self, config: dict[str, Any]) -> set[str]:
        return {"full_attention", "sliding_attention"}


FAMILY = Qwen2("Qwen2", Qwen2ForCausalLM, LowRankQwen2ForCausalLM)
