"""Mistral (Jiang et al. 2023): Llama with a sliding window."""

from __future__ import annotations

from typing import Any

from transformers import MistralConfig, MistralForCausalLM

from finhpc.models.families.family import LowRankConfig, LowRankModel
from finhpc.models.families.llama import Llama


class LowRankMistralConfig(LowRankConfig, MistralConfig):
    model_type = "lowrank_mistral"


class LowRankMistralForCausalLM(LowRankModel, MistralForCausalLM):
    config_class = LowRankMistralConfig


class Mistral(Llama):
    def layer_types(self, config: dict[str, Any]) -> set[str]:
        return {"sliding_attention" if config.get("sliding_window") else "full_attention"}


FAMILY = Mistral("Mistral", MistralForCausalLM, LowRankMistralForCausalLM)
