"""Tiny dense models of both families, written as transformers writes them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel


def tiny_gpt2(vocab: int = 300, layers: int = 3) -> PreTrainedModel:
    """Untrained, with weights large enough that every layer matters; its embedding is its head."""
    return _settled(GPT2LMHeadModel(GPT2Config(vocab_size=vocab, n_positions=64, n_embd=32, n_layer=layers, n_head=4)))


def tiny_llama(vocab: int = 300, tied: bool = True, layers: int = 3, context: int = 64) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        tie_word_embeddings=tied,
    )
    return _settled(LlamaForCausalLM(config))


def _settled(model: PreTrainedModel) -> PreTrainedModel:
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
