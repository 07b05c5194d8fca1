"""GPT-2: dense (transformers' own) and low-rank."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from finhpc.lowrank.replace import LowRankModel
from finhpc.models.families import flow
from finhpc.models.families.family import Family, Flow, Part
from finhpc.models.families.presets import Shape


class LowRankGPT2Config(GPT2Config):
    """GPT2Config and `low_rank`: kind of layer -> rank, or None where it is dense; `low_rank_kind`: `method.kind`.

    `low_rank_layers`: name -> rank of single layers, before their kind's. `dense_tied`: whether the dense model has
    one matrix as embedding and head. `factor_modules`: A and B are modules, as a quantized model has them.
    """

    model_type = "lowrank_gpt2"
    low_rank: dict[str, int | None] | None = None
    low_rank_kind: str = "low_rank"
    low_rank_layers: dict[str, int] | None = None
    dense_tied: bool = False
    factor_modules: bool = False


class LowRankGPT2LMHeadModel(LowRankModel, GPT2LMHeadModel):
    """transformers' GPT-2 with its linear layers as B A."""

    config_class = LowRankGPT2Config


def _settings(shape: Shape) -> dict[str, Any]:
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


def dense_config(shape: Shape) -> GPT2Config:
    return GPT2Config(**_settings(shape))


def low_rank_config(shape: Shape, ranks: dict[str, int | None], kind: str) -> LowRankGPT2Config:
    tied = shape.tie_embeddings and ranks.get("head") is None and ranks.get("embedding") is None
    settings = _settings(shape) | {"tie_word_embeddings": tied, "dense_tied": shape.tie_embeddings}
    return LowRankGPT2Config(**settings, low_rank=ranks, low_rank_kind=kind)


def add_positions(data: Flow, module: nn.Module) -> Flow:
    hidden, tokens = data
    positions = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
    return hidden + module(positions), tokens


def attend(data: Flow, norm: nn.Module, attention: nn.Module) -> Flow:
    """The first half of a block."""
    hidden, tokens = data
    return attention(norm(hidden))[0] + hidden, tokens


def block(name: str) -> list[Part]:
    return [
        Part((f"{name}.ln_1", f"{name}.attn"), "attention", attend),
        Part((f"{name}.ln_2", f"{name}.mlp"), "mlp", flow.mlp),
    ]


def parts(config: GPT2Config) -> list[Part]:
    tied = config.tie_word_embeddings
    return [
        Part(("transformer.wte",), "embedding", flow.embed),
        Part(("transformer.wpe",), "positions", add_positions),
        *([Part(("transformer.drop",), "dropout", flow.norm)] if config.embd_pdrop else []),
        *(part for i in range(config.n_layer) for part in block(f"transformer.h.{i}")),
        Part(("transformer.ln_f",), "norm", flow.norm),
        Part(("transformer.wte",), "head", flow.tied_head) if tied else Part(("lm_head",), "head", flow.head),
    ]


def init_std(name: str, config: GPT2Config) -> float:
    """Standard deviation of a weight at the start; residual projections shrink with depth (GPT-2)."""
    if name.endswith("c_proj"):
        return float(config.initializer_range) / math.sqrt(2 * config.n_layer)
    return float(config.initializer_range)


FAMILY = Family("gpt2", "gpt2", dense_config, low_rank_config, GPT2LMHeadModel, LowRankGPT2LMHeadModel, parts, init_std)
