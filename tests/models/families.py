"""Tiny random models of every family, with what makes each differ from Llama switched on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers
from transformers import PreTrainedModel

from tests.models.dense import settled

WINDOW = 12  # tokens: shorter than the tests' sequences
CONTEXT = 96
SHAPE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
SLIDES = ["sliding_attention", "full_attention", "sliding_attention"]
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "original_max_position_embeddings": 80,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
}
LONGROPE |= {"short_factor": [1.0, 1.3, 1.7], "long_factor": [2.0, 3.0, 4.0]}

# Name of a row -> model type, start of transformers' names of its classes, and the settings that its layers differ by.
ROWS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Qwen3": ("qwen3", "Qwen3", {"head_dim": 12}),
    "Qwen3, windows": (
        "qwen3", "Qwen3",
        {"head_dim": 8, "use_sliding_window": True, "sliding_window": WINDOW, "layer_types": SLIDES},
    ),
    "Gemma": ("gemma", "Gemma", {"head_dim": 12, "num_key_value_heads": 1}),
    "Gemma 2": (
        "gemma2", "Gemma2",
        {"head_dim": 12, "sliding_window": WINDOW, "layer_types": SLIDES, "query_pre_attn_scalar": 10}
        | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "Gemma 3": (
        "gemma3_text", "Gemma3",
        {"head_dim": 12, "sliding_window": WINDOW, "layer_types": SLIDES, "query_pre_attn_scalar": 10},
    ),
    "Phi-3": ("phi3", "Phi3", {"sliding_window": WINDOW}),
    "Phi-4, longrope": (
        "phi3", "Phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 80, "tie_word_embeddings": True},
    ),
    "SmolLM3": ("smollm3", "SmolLM3", {"no_rope_layers": [1, 0, 1], "tie_word_embeddings": True}),
    "OLMo 2": ("olmo2", "Olmo2", {}),
    "Granite": (
        "granite", "Granite",
        {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.6, "attention_multiplier": 0.2},
    ),
    "StableLM": ("stablelm", "StableLm", {"use_qkv_bias": True, "qk_layernorm": True}),
    "StableLM, parallel": ("stablelm", "StableLm", {"use_parallel_residual": True}),
    "Starcoder2": ("starcoder2", "Starcoder2", {"sliding_window": WINDOW}),
    "GPT-NeoX": ("gpt_neox", "GPTNeoX", {}),
    "GPT-NeoX, one after the other": ("gpt_neox", "GPTNeoX", {"use_parallel_residual": False}),
}  # fmt: skip


def tiny(row: str, **more: Any) -> PreTrainedModel:
    """Return the model of a row, untrained, with weights large enough that every layer matters."""
    _, start, settings = ROWS[row]
    of_text = "TextConfig" if start == "Gemma3" else "Config"
    make: Callable[..., Any] = getattr(transformers, f"{start}{of_text}")
    fields = SHAPE | settings | more
    config = make(**{key: value for key, value in fields.items() if key in make.__dataclass_fields__})  # type: ignore[attr-defined]
    return settled(getattr(transformers, f"{start}ForCausalLM")(config))
