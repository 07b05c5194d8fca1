"""A low-rank model in vLLM: transformers' modules with vLLM's attention, cache and linear layers.

vLLM's backend for transformers' models (vllm/model_executor/models/transformers/base.py) builds a model without memory,
replaces its linear layers, embeddings and norms by its own, and reads the weights into these. A and B of a low-rank
layer are two linear layers to it. What it does not have is here: queries, keys and values in blocks, a low-rank head,
and GPT-2's attention.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.transformers import TransformersForCausalLM
from vllm.model_executor.models.utils import maybe_prefix

from finhpc.lowrank.layers import LowRankLinear, latent_of
from finhpc.lowrank.registry import SLTRAIN


class Blocks(nn.ModuleList):
    """The rows of B of each block as a layer of its own; a file has them in one tensor."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Called by vLLM with (weight or bias, tensor); returns the names of the parameters that it filled."""
        loaded = set()
        for name, tensor in weights:
            for i, rows in enumerate(tensor.chunk(len(self))):
                parameter: Any = getattr(self[i], name)
                parameter.weight_loader(parameter, rows)
                loaded.add(f"{i}.{name}")
        return loaded


class SeparateLinear(nn.Module):
    """`LowRankLinear` with several blocks, whose B is a layer per block, so that vLLM can replace each."""

    def __init__(self, layer: LowRankLinear) -> None:
        super().__init__()
        rows, bias = layer.out_features // layer.blocks, layer.B.bias is not None
        self.A, self.between = layer.A, layer.between
        with layer.B.weight.device:
            self.B = Blocks(nn.Linear(layer.rank, rows, bias) for _ in range(layer.blocks))

    def forward(self, x: Tensor) -> Tensor:
        latent = latent_of(self.A(x), self.between, len(self.B))
        return torch.cat([b(z) for b, z in zip(self.B, latent.unbind(-2), strict=True)], -1)


def body(model: Any) -> nn.Module:
    """Return a causal model without its head, as vLLM can run it."""
    found: Any = model.base_model
    found._keys_to_ignore_on_load_unexpected = None  # GPT-2's "attn.bias" would also match c_attn.bias
    for name, module in list(found.named_modules()):
        if isinstance(module, LowRankLinear) and module.blocks > 1:
            found.set_submodule(name, SeparateLinear(module))
        elif isinstance(module, GPT2Attention):
            module.c_proj.register_forward_pre_hook(partial(_in_rows, width=module.embed_dim))
    return found  # type: ignore[no-any-return]


def _in_rows(projection: nn.Module, inputs: tuple[Tensor], width: int) -> tuple[Tensor]:
    """vLLM's attention returns (tokens, heads * size), without a batch, which GPT-2 flattens to one row."""
    return (inputs[0].reshape(1, -1, width),)


class LowRankHead(nn.Module):
    """The head's A, and its B as vLLM's layer for vocabularies."""

    def __init__(self, rank: int, text: Any, prefix: str) -> None:
        super().__init__()
        self.A = ReplicatedLinear(text.hidden_size, rank, bias=False, return_bias=False, prefix=f"{prefix}.A")
        self.B = ParallelLMHead(text.vocab_size, rank, prefix=f"{prefix}.B")


class LowRankForCausalLM(TransformersForCausalLM):  # type: ignore[misc]
    """A low-rank model of finhpc; raises `ValueError` for a kind whose layers are not two products."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config: Any = vllm_config.model_config.hf_config
        if config.low_rank_kind == SLTRAIN:
            raise ValueError(
                f"method.kind={SLTRAIN} has a dense matrix in each layer, which vLLM would not read; run finhpc export "
                "--format merged and serve the result."
            )
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        rank = (config.low_rank_layers or {}).get("lm_head", (config.low_rank or {}).get("head"))
        if rank is not None and self.pp_group.is_last_rank:
            self.lm_head = LowRankHead(rank, self.text_config, maybe_prefix(prefix, "lm_head"))

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        if not isinstance(self.lm_head, LowRankHead):
            logits: Tensor | None = super().compute_logits(hidden_states)
            return logits
        latent = self.lm_head.A(hidden_states)
        logits = self.logits_processor(self.lm_head.B, latent)
        return logits
