"""Tiny dense models of all families, written as transformers writes them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)


def tiny_gpt2(vocab: int = 300, layers: int = 3) -> PreTrainedModel:
    """Untrained, with weights large enough that every layer matters; its embedding is its head."""
    return settled(GPT2LMHeadModel(GPT2Config(vocab_size=vocab, n_positions=64, n_embd=32, n_layer=layers, n_head=4)))


def tiny_llama(vocab: int = 300, tied: bool = True, layers: int = 3, context: int = 64) -> PreTrainedModel:
    config = LlamaConfig(**_shape(vocab, layers, context), tie_word_embeddings=tied)
    return settled(LlamaForCausalLM(config))


def tiny_mistral(context: int = 64, window: int | None = None) -> PreTrainedModel:
    """Heads of 12, which together are wider than the model, as in Mistral Nemo."""
    config = MistralConfig(**_shape(context=context), head_dim=12, sliding_window=window)
    return settled(MistralForCausalLM(config))


def tiny_qwen2(context: int = 64) -> PreTrainedModel:
    """With biases on queries, keys and values."""
    return settled(Qwen2ForCausalLM(Qwen2Config(**_shape(context=context), tie_word_embeddings=True)))


def _shape(vocab: int = 300, layers: int = 3, context: int = 64) -> dict[str, int]:
    return {
        "vocab_size": vocab,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": context,
    }


def settled(model: PreTrainedModel) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


def logits(model: PreTrainedModel, vocab: int = 300) -> torch.Tensor:
    tokens = torch.randint(0, vocab, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(tokens).logits


def saved(model: PreTrainedModel, folder: Path, **how: str) -> Path:
    model.save_pretrained(folder, **how)
    return folder
