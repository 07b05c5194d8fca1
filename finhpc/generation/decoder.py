"""A model's next-token logits with its keys and values kept: the inner loop of generation.

transformers' `generate` spends much of a small model's time in Python. Here a pass calls the model's own
modules, whatever they are (dense, B A, packed, with adapters), and writes keys and values into place.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from finhpc.models.families.registry import context_of, family_of


class Decoder:
    """`model`: one of `finhpc.models.families.registry`, in eval mode. Raises `ConfigError` for another family.

    `computed_tokens`: tokens that went through the model, padding too, counted in every pass.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config
        self.blocks = {"gpt2": self._gpt2, "llama": self._llama}[family_of(self.config).modules]
        self.heads: int = self.config.num_attention_heads
        self.kv_heads: int = getattr(self.config, "num_key_value_heads", self.heads)
        self.head_size: int = getattr(self.config, "head_dim", None) or self.config.hidden_size // self.heads
        self.context = context_of(self.config)
        self.device = next(model.parameters()).device
        self.computed_tokens = 0
        self.past, self.keys, self.values = 0, [], []  # type: ignore[var-annotated]

    def reset(self, batch: int, length: int, padding: Tensor | None = None) -> None:
        """Room for `length` tokens in each of `batch` rows; `padding`: int64 (batch,), of them before each row's own.

        Keys and values are float32 on a CPU, where torch's attention in 16 bits is five times slower.
        """
        self.past, self.padding = 0, padding if padding is not None and bool(padding.any()) else None
        dtype = torch.float32 if self.device.type == "cpu" else self.model.dtype
        shape = (self.config.num_hidden_layers, batch, self.kv_heads, length, self.head_size)
        self.keys = list(torch.empty(shape, dtype=dtype, device=self.device))
        self.values = list(torch.empty(shape, dtype=dtype, device=self.device))
        self.length = length

    @property
    def cache_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self.keys, *self.values))

    @torch.inference_mode()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits (batch, vocab) after the last of `tokens` int64 (batch, seq), which follow those passed before."""
        batch, seq = tokens.shape
        places = torch.arange(self.past, self.past + seq, device=self.device)
        positions = places[None].expand(batch, -1)
        mask = None
        if self.padding is not None:
            positions = (positions - self.padding[:, None]).clamp_min(0)
            seen = torch.arange(self.past + seq, device=self.device)
            # A place of padding sees itself alone: nothing reads it, and it must not become NaN.
            mask = (seen <= places[:, None]) & (seen >= self.padding[:, None, None])
            mask = (mask | (seen == places[:, None]))[:, None]
        elif seq > 1 and self.past:
            mask = torch.arange(self.past + seq, device=self.device) <= places[:, None]
        logits: Tensor = self.model.lm_head(self.blocks(tokens, positions, mask))
        self.past += seq
        self.computed_tokens += tokens.numel()
        return logits

    def _gpt2(self, tokens: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        base = self.model.transformer
        hidden = base.wte(tokens) + base.wpe(positions)
        for i, block in enumerate(base.h):
            attention = block.attn
            q, k, v = attention.c_attn(block.ln_1(hidden)).split(self.config.hidden_size, -1)
            attended = self._attend(i, self._heads(q), self._heads(k), self._heads(v), mask, attention.scaling)
            hidden = hidden + attention.c_proj(attended.to(hidden.dtype))
            hidden = hidden + block.mlp(block.ln_2(hidden))
        return base.ln_f(hidden[:, -1])  # type: ignore[no-any-return]

    def _llama(self, tokens: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        base = self.model.model
        hidden = base.embed_tokens(tokens)
        cos, sin = base.rotary_emb(hidden, positions)
        for i, block in enumerate(base.layers):
            attention, x = block.self_attn, block.input_layernorm(hidden)
            q, k, v = (self._heads(project(x)) for project in (attention.q_proj, attention.k_proj, attention.v_proj))
            q, k = apply_rotary_pos_emb(q, k, cos, sin)
            attended = self._attend(i, q, k, v, mask, attention.scaling)
            hidden = hidden + attention.o_proj(attended.to(hidden.dtype))
            hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
        return base.norm(hidden[:, -1])  # type: ignore[no-any-return]

    def _heads(self, x: Tensor) -> Tensor:
        """(batch, seq, heads * size) -> (batch, heads, seq, size)."""
        return x.view(*x.shape[:-1], -1, self.head_size).transpose(1, 2)

    def _attend(self, i: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """Attention of block `i` over all its keys so far: (batch, seq, heads * size)."""
        batch, heads, seq, size = q.shape
        end = self.past + seq
        self.keys[i][:, :, self.past : end] = k
        self.values[i][:, :, self.past : end] = v
        keys, values = self.keys[i][:, :, :end], self.values[i][:, :, :end]
        q = q.to(keys.dtype)
        if seq == 1:  # query heads that share keys stand where several tokens' queries would
            q = q.reshape(batch, self.kv_heads, heads // self.kv_heads, size)
            out = F.scaled_dot_product_attention(q, keys, values, mask, scale=scale)
            return out.reshape(batch, 1, heads * size)
        out = F.scaled_dot_product_attention(
            q, keys, values, mask, is_causal=mask is None, scale=scale, enable_gqa=heads != self.kv_heads
        )
        return out.transpose(1, 2).reshape(batch, seq, heads * size)
