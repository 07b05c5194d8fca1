"""GPT-2 (Radford et al. 2019)."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from finhpc.models.families.family import Family, Heads
from finhpc.models.families.presets import Shape


class Gpt2(Family):
    embedding, positions = "transformer.wte", "transformer.wpe"
    blocks, attention, mlp = "transformer.h", ("ln_1", "attn"), ("ln_2", "mlp")
    output_projection, norm, joint_qkv = "c_proj", "transformer.ln_f", "attn.c_attn"
    dropout = "transformer.drop"
    projections: ClassVar[dict[str, str]] = {
        "attn.c_attn": "qkv", "attn.c_proj": "out", "mlp.c_fc": "up", "mlp.c_proj": "down",
    }  # fmt: skip

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

    def heads(self, attention: Any, x: Tensor, rotated: None) -> Heads:
        q, k, v = (
            part.view(*x.shape[:-1], -1, attention.head_dim)
            for part in attention.c_attn(x).split(attention.split_size, -1)
        )
        return q, k, v


FAMILY = Gpt2("GPT-2", GPT2LMHeadModel)
