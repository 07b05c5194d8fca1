"""Llama (Touvron et al. 2023), and the families that have Llama's modules under Llama's names: Mistral, Qwen2."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen2ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from finhpc.models.families.family import Family, Heads
from finhpc.models.families.parts import Flow, Rotated
from finhpc.models.families.presets import Shape


class Llama(Family):
    """Rotary positions, shared key and value heads, gated MLP."""

    def config_fields(self, shape: Shape) -> dict[str, Any]:
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

    def shape_problems(self, shape: Shape) -> list[str]:
        problems = []
        if shape.width % shape.heads == 0 and (size := shape.width // shape.heads) % 2:
            problems.append(f"model.width/heads={size} is odd; rotary positions need an even size.")
        if shape.dropout:
            problems.append(f"model.dropout={shape.dropout} is for GPT-2 shapes; {self.label} has none; use 0.")
        return problems

    def attention_half(self, config: LlamaConfig) -> Attention:
        return Attention(partial(self.rotary, config))

    def rotary(self, config: LlamaConfig) -> LlamaRotaryEmbedding:
        return LlamaRotaryEmbedding(config)

    def heads(self, attention: Any, x: Tensor, rotated: tuple[Tensor, Tensor]) -> Heads:
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        q, k, v = (project(x).view(*x.shape[:-1], -1, attention.head_dim) for project in projections)
        return *apply_rotary_pos_emb(q, k, *rotated, unsqueeze_dim=2), v


class Attention(Rotated):
    """The attention half of a decoder layer, with its rotary positions; the layers of a stage share one instance."""

    def __call__(self, data: Flow, norm: nn.Module, attention: nn.Module) -> Flow:
        hidden, tokens = data
        self.prepare(data)
        attended, _ = attention(norm(hidden), position_embeddings=self.of(hidden), attention_mask=None)
        return hidden + attended, tokens


class Mistral(Llama):
    """Jiang et al. 2023: a sliding window."""

    def layer_types(self, config: dict[str, Any]) -> set[str]:
        return {"sliding_attention" if config.get("sliding_window") else "full_attention"}


class Qwen2(Llama):
    """Yang et al. 2024: biases on queries, keys and values."""

    def layer_types(self, config: dict[str, Any]) -> set[str]:
        return {"full_attention", "sliding_attention"}


FAMILIES = (
    Llama("Llama", LlamaForCausalLM),
    Mistral("Mistral", MistralForCausalLM),
    Qwen2("Qwen2", Qwen2ForCausalLM),
)
