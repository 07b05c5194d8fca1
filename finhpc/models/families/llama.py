"""Llama: dense (transformers' own) and low-rank; and what Llama-like families share with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from finhpc.lowrank.replace import LowRankModel
from finhpc.models.families import flow
from finhpc.models.families.family import Family, Flow, Part
from finhpc.models.families.presets import Shape


class LowRankLlamaConfig(LlamaConfig):
    """LlamaConfig and `low_rank`: kind of layer -> rank, or None where it is dense; `low_rank_kind`: `method.kind`.

    `low_rank_layers`: name -> rank of single layers, before their kind's. `dense_tied`: whether the dense model has
    one matrix as embedding and head. `factor_modules`: A and B are modules, as a quantized model has them.
    """

    model_type = "lowrank_llama"
    low_rank: dict[str, int | None] | None = None
    low_rank_kind: str = "low_rank"
    low_rank_layers: dict[str, int] | None = None
    dense_tied: bool = False
    factor_modules: bool = False


class LowRankLlamaForCausalLM(LowRankModel, LlamaForCausalLM):
    """transformers' Llama with its linear layers as B A."""

    config_class = LowRankLlamaConfig


def _settings(shape: Shape) -> dict[str, Any]:
    return {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.width,
        "intermediate_size": shape.mlp_width or 4 * shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads or shape.heads,
        "max_position_embeddings": shape.context,
        "tie_word_embeddings": shape.tie_embeddings,
        "bos_token_id": None,
        "eos_token_id": None,
    }


class Attend:
    """The first half of a decoder layer, with its rotary positions; one instance serves all layers of a stage."""

    def __init__(self, config: LlamaConfig) -> None:
        self.config = config
        self.rotary: LlamaRotaryEmbedding | None = None

    def __call__(self, data: Flow, norm: nn.Module, attention: nn.Module) -> Flow:
        hidden, tokens = data
        if self.rotary is None:  # made on first use: the skeleton's own lies on the meta device
            self.rotary = LlamaRotaryEmbedding(self.config).to(hidden.device)
        positions = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
        attended, _ = attention(norm(hidden), position_embeddings=self.rotary(hidden, positions), attention_mask=None)
        return hidden + attended, tokens


def block(name: str, attend: Attend) -> list[Part]:
    return [
        Part((f"{name}.input_layernorm", f"{name}.self_attn"), "attention", attend),
        Part((f"{name}.post_attention_layernorm", f"{name}.mlp"), "mlp", flow.mlp),
    ]


def parts(config: LlamaConfig) -> list[Part]:
    tied = config.tie_word_embeddings
    attend = Attend(config)
    return [
        Part(("model.embed_tokens",), "embedding", flow.embed),
        *(part for i in range(config.num_hidden_layers) for part in block(f"model.layers.{i}", attend)),
        Part(("model.norm",), "norm", flow.norm),
        Part(("model.embed_tokens",), "head", flow.tied_head) if tied else Part(("lm_head",), "head", flow.head),
    ]


def init_std(name: str, config: LlamaConfig) -> float:
    return float(config.initializer_range)


def llama_like(name: str, dense_class: Any, low_rank_class: Any) -> Family:
    """A family whose models have Llama's modules under Llama's names, and its rotary positions."""

    def dense_config(shape: Shape) -> Any:
        return dense_class.config_class(**_settings(shape))

    def low_rank_config(shape: Shape, ranks: dict[str, int | None], kind: str) -> Any:
        tied = shape.tie_embeddings and ranks.get("head") is None and ranks.get("embedding") is None
        settings = _settings(shape) | {"tie_word_embeddings": tied, "dense_tied": shape.tie_embeddings}
        return low_rank_class.config_class(**settings, low_rank=ranks, low_rank_kind=kind)

    return Family(name, "llama", dense_config, low_rank_config, dense_class, low_rank_class, parts, init_std)


FAMILY = llama_like("llama", LlamaForCausalLM, LowRankLlamaForCausalLM)
