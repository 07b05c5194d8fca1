"""GPT-2 (Radford et al. 2019)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

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
from finhpc.models.packing.layout import layout_of


class LowRankGPT2Config(LowRankConfig, GPT2Config):
    model_type = "lowrank_gpt2"


class LowRankGPT2LMHeadModel(LowRankModel, GPT2LMHeadModel):
    config_class = LowRankGPT2Config


class Gpt2(Family):
    embedding = "transformer.wte"
    output_projection = "c_proj"

    def config_fields(self, shape: Shape) -> dict[str, Any]:
        return {
            "vocab_size": shape.vocab_size,
            "n_positions": shape.context,
            "n_embd": shape.width,
            "n_layer": shape.layers,
            "n_head": shape.heads,
            "n_inner": shape.mlp_width or None,
            "activation_function": "gelu_pytorch_tanh",  # gelu_new in one pass instead of eight
            "resid_pdrop": shape.dropout,
            "embd_pdrop": shape.dropout,
            "attn_pdrop": shape.dropout,
            "tie_word_embeddings": shape.tie_embeddings,
            "bos_token_id": None,
            "eos_token_id": None,
        }

    def shape_problems(self, shape: Shape) -> list[str]:
        return ["model.kv_heads is for Llama shapes; leave it out for GPT-2."] if shape.kv_heads else []

    def gguf_fields(self, values: dict[str, Any]) -> dict[str, Any]:
        # transformers reads these under names that GPT2Config does not have.
        return {"n_positions": values["context_length"], "n_inner": values.get("feed_forward_length")}

    def init_std(self, name: str, config: GPT2Config) -> float:
        """Residual projections shrink with depth."""
        std = float(config.initializer_range)
        return std / math.sqrt(2 * config.n_layer) if name.endswith("c_proj") else std

    def parts(self, config: GPT2Config) -> list[Part]:
        row = [Part(("transformer.wte",), "embedding", flow.embed), Part(("transformer.wpe",), "positions", _positions)]
        if config.embd_pdrop:
            row.append(Part(("transformer.drop",), "dropout", flow.apply))
        for i in range(config.n_layer):
            block = f"transformer.h.{i}"
            row.append(Part((f"{block}.ln_1", f"{block}.attn"), "attention", _attention))
            row.append(Part((f"{block}.ln_2", f"{block}.mlp"), "mlp", flow.mlp))
        row.append(Part(("transformer.ln_f",), "norm", flow.apply))
        row.append(Part((self.embedding if config.tie_word_embeddings else self.head,), "head", flow.head))
        return row

    def packed_attention(self, config: GPT2Config) -> PackedAttention:
        return _packed_attention

    def decode(self, model: Any, tokens: Tensor, positions: Tensor, attend: CachedAttention) -> Tensor:
        base = model.transformer
        hidden = base.wte(tokens) + base.wpe(positions)
        for i, block in enumerate(base.h):
            attention = block.attn
            qkv = attention.c_attn(block.ln_1(hidden)).split(attention.split_size, -1)
            q, k, v = (flow.split_heads(x, attention.head_dim) for x in qkv)
            attended = attend(i, q, k, v, attention.scaling)
            hidden = hidden + attention.c_proj(attended.to(hidden.dtype))
            hidden = hidden + block.mlp(block.ln_2(hidden))
        return base.ln_f(hidden[:, -1])  # type: ignore[no-any-return]


def _positions(data: Flow, module: nn.Module) -> Flow:
    hidden, tokens = data
    positions = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
    return hidden + module(positions), tokens


def _attention(data: Flow, norm: nn.Module, attention: nn.Module) -> Flow:
    hidden, tokens = data
    return attention(norm(hidden))[0] + hidden, tokens


def _packed_attention(module: Any, x: Tensor, pack: Tensor, keep: bool) -> Tensor:
    heads = (x.shape[1], module.num_heads, module.head_dim)
    q, k, v = (part.reshape(heads) for part in module.c_attn(x)[0].split(module.split_size, -1))
    scale = module.head_dim**-0.5 if module.scale_attn_weights else 1.0
    if module.scale_attn_by_inverse_layer_idx:
        scale /= module.layer_idx + 1
    return attend_segments(q, k, v, layout_of(pack), scale, keep).view(x.shape)


FAMILY = Gpt2("GPT-2", GPT2LMHeadModel, LowRankGPT2LMHeadModel)
