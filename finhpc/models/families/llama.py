"""Llama (Touvron et al. 2023), and what families with Llama's modules under Llama's names share with it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from finhpc.models.families import flow
from finhpc.models.families.family import (
    CachedAttention,
    Family,
    Flow,
    LowRankConfig,
    LowRankModel,
    PackedAttention,
    Part,
)
from finhpc.models.families.presets import Shape
from finhpc.models.packing.attention import attend_segments
from finhpc.models.packing.layout import POSITION, layout_of


class LowRankLlamaConfig(LowRankConfig, LlamaConfig):
    model_type = "lowrank_llama"


class LowRankLlamaForCausalLM(LowRankModel, LlamaForCausalLM):
    config_class = LowRankLlamaConfig


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

    def parts(self, config: LlamaConfig) -> list[Part]:
        attention = Attention(config)
        row = [Part((self.embedding,), "embedding", flow.embed)]
        for i in range(config.num_hidden_layers):
            block = f"model.layers.{i}"
            row.append(Part((f"{block}.input_layernorm", f"{block}.self_attn"), "attention", attention))
            row.append(Part((f"{block}.post_attention_layernorm", f"{block}.mlp"), "mlp", flow.mlp))
        row.append(Part(("model.norm",), "norm", flow.apply))
        row.append(Part((self.embedding if config.tie_word_embeddings else self.head,), "head", flow.head))
        return row

    def packed_attention(self, config: LlamaConfig) -> PackedAttention:
        return partial(_packed_attention, config)

    def decode(self, model: Any, tokens: Tensor, positions: Tensor, attend: CachedAttention) -> Tensor:
        base = model.model
        hidden = base.embed_tokens(tokens)
        cos, sin = base.rotary_emb(hidden, positions)
        for i, block in enumerate(base.layers):
            attention, x = block.self_attn, block.input_layernorm(hidden)
            projections = (attention.q_proj, attention.k_proj, attention.v_proj)
            q, k, v = (flow.split_heads(project(x), attention.head_dim) for project in projections)
            q, k = apply_rotary_pos_emb(q, k, cos, sin)
            attended = attend(i, q, k, v, attention.scaling)
            hidden = hidden + attention.o_proj(attended.to(hidden.dtype))
            hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
        return base.norm(hidden[:, -1])  # type: ignore[no-any-return]


class Attention:
    """The attention half of a decoder layer, with its rotary positions; the layers of a stage share one instance."""

    def __init__(self, config: LlamaConfig) -> None:
        self.config = config
        self.rotary: LlamaRotaryEmbedding | None = None

    def __call__(self, data: Flow, norm: nn.Module, attention: nn.Module) -> Flow:
        hidden, tokens = data
        if self.rotary is None:  # built on first use: the skeleton's own is on the meta device
            self.rotary = LlamaRotaryEmbedding(self.config).to(hidden.device)
        positions = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
        attended, _ = attention(norm(hidden), position_embeddings=self.rotary(hidden, positions), attention_mask=None)
        return hidden + attended, tokens


def _packed_attention(config: LlamaConfig, module: Any, x: Tensor, pack: Tensor, keep: bool) -> Tensor:
    layout, shape = layout_of(pack), (x.shape[1], -1, module.head_dim)
    q, k, v = (linear(x)[0].view(shape) for linear in (module.q_proj, module.k_proj, module.v_proj))
    key = ("rotary", id(config), x.dtype)
    if key not in layout.cache:  # cos and sin (T, 1, head size) of every token's position, once per pack and stage
        with torch.no_grad():
            cos, sin = LlamaRotaryEmbedding(config).to(x.device)(x, pack[:, POSITION])
        layout.cache[key] = cos[0, :, None], sin[0, :, None]
    cos, sin = layout.cache[key]
    out = attend_segments(_rotate(q, cos, sin), _rotate(k, cos, sin), v, layout, module.scaling, keep)
    return out.view(1, x.shape[1], -1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions as transformers does, to (T, heads, size)."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


FAMILY = Llama("Llama", LlamaForCausalLM, LowRankLlamaForCausalLM)
