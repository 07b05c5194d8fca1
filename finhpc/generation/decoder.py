"""Next-token logits of a model with cached keys and values: the inner loop of generation.

transformers' `generate` spends much of a small model's time in Python. Here a pass calls the model's own modules
(dense, low-rank, quantized, with adapters) by the names of its family, and writes keys and values in place.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finhpc.models.attention import NAME, Attend, Scores, attend
from finhpc.models.families.described import position_kinds
from finhpc.models.families.parts import Ends, rotate
from finhpc.models.families.registry import context_of, family_of


class Decoder:
    """`model`: of a registered family, in eval mode. Raises `ConfigError` for another family.

    `computed_tokens`: tokens that went through the model, including padding, counted in every pass.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.config, self.family = model, model.config, family_of(model.config)
        self.heads: int = self.config.num_attention_heads
        self.kv_heads: int = getattr(self.config, "num_key_value_heads", self.heads)
        self.head_size: int = getattr(self.config, "head_dim", None) or self.config.hidden_size // self.heads
        self.context = context_of(self.config)
        self.ends = Ends.of(self.config)
        self.rotary = self.family.rotary(self.config)
        self.device = next(model.parameters()).device
        if self.rotary is not None:
            self.rotary.to(self.device)
        if self.family.whole_layers:
            self.config._attn_implementation = NAME
        self.computed_tokens = 0
        self.past, self.keys, self.values, self.blocks = 0, [], [], []  # type: ignore[var-annotated]

    def reset(self, batch: int, length: int, padding: Tensor | None = None) -> None:
        """Allocate `length` tokens for each of `batch` rows; `padding`: int64 (batch,), tokens before each row's own.

        Keys and values are float32 on a CPU, where torch's attention in 16 bits is five times slower.
        """
        self.past, self.padding = 0, padding if padding is not None and bool(padding.any()) else None
        dtype = torch.float32 if self.device.type == "cpu" else self.model.dtype
        shape = (self.config.num_hidden_layers, batch, self.kv_heads, length, self.head_size)
        self.keys = list(torch.empty(shape, dtype=dtype, device=self.device))
        self.values = list(torch.empty(shape, dtype=dtype, device=self.device))
        self.length = length
        self.blocks = [self._block(i) for i in range(self.config.num_hidden_layers)]

    def _block(self, i: int) -> tuple[Any, ...]:
        """Return the norm, attention and output projection, and the norm and MLP of a block; or its one layer."""
        if self.family.whole_layers:
            return (self.model.get_submodule(f"{self.family.blocks}.{i}"),)
        names, mlp = self.family.block_names(i, self.family.attention), self.family.block_names(i, self.family.mlp)
        projection = f"{names[1]}.{self.family.output_projection}"
        return tuple(self.model.get_submodule(name) for name in (*names, projection, *mlp))

    @property
    def cache_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    @torch.inference_mode()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Return the logits (batch, vocab) after the last of `tokens` int64 (batch, seq), which follow earlier ones."""
        batch, seq = tokens.shape
        places = torch.arange(self.past, self.past + seq, device=self.device)
        positions = places[None].expand(batch, -1)
        mask = None
        if self.padding is not None:
            positions = (positions - self.padding[:, None]).clamp_min(0)
            seen = torch.arange(self.past + seq, device=self.device)
            # A padding token sees only itself: nothing reads it, but it must not become NaN.
            mask = (seen <= places[:, None]) & (seen >= self.padding[:, None, None])
            mask = (mask | (seen == places[:, None]))[:, None]
        elif seq > 1 and self.past:
            mask = torch.arange(self.past + seq, device=self.device) <= places[:, None]
        logits = self._logits(tokens, positions, mask)
        self.past += seq
        self.computed_tokens += tokens.numel()
        return logits

    def _logits(self, tokens: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        family, module = self.family, self.model.get_submodule
        hidden = self.ends.embed(module(family.embedding), tokens)
        if family.positions:
            hidden = hidden + module(family.positions)(positions)
        hidden = (self._layers if family.whole_layers else self._halves)(hidden, positions, mask)
        return self.ends.predict(module(family.norm)(hidden[:, -1]), module(family.head))

    def _halves(self, hidden: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        rotated = rotate(self.rotary, hidden, positions, None)
        for i, (norm, attention, project, mlp_norm, mlp) in enumerate(self.blocks):
            q, k, v = (x.transpose(1, 2) for x in self.family.heads(attention, norm(hidden), rotated))
            attended = self._attend(mask, i, q, k, v, attention.scaling)
            hidden = hidden + project(attended.to(hidden.dtype))
            hidden = hidden + mlp(mlp_norm(hidden))
        return hidden

    def _layers(self, hidden: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        kinds = position_kinds(self.config)
        rotated = {kind: rotate(self.rotary, hidden, positions, kind) for kind in set(kinds)}

        def run(module: Any, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
            keys, values = self._store(module.layer_idx, k, v)
            return attend(q.to(keys.dtype), keys, values, mask, scores).transpose(1, 2).to(q.dtype)

        for (layer,), kind in zip(self.blocks, kinds, strict=True):
            hidden = layer(hidden, attention_mask=Attend(run), position_embeddings=rotated[kind])
        return hidden

    def _store(self, block: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values of a block, and return all of them so far."""
        end = self.past + k.shape[2]
        self.keys[block][:, :, self.past : end] = k
        self.values[block][:, :, self.past : end] = v
        return self.keys[block][:, :, :end], self.values[block][:, :, :end]

    def _attend(self, mask: Tensor | None, block: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Store keys and values of a block, and attend to all of them so far: (batch, seq, heads * size)."""
        batch, heads, seq, size = q.shape
        keys, values = self._store(block, k, v)
        q = q.to(keys.dtype)
        if seq == 1:  # query heads that share keys take the place of several tokens' queries
            q = q.reshape(batch, self.kv_heads, heads // self.kv_heads, size)
            out = F.scaled_dot_product_attention(q, keys, values, mask, scale=scale)
            return out.reshape(batch, 1, heads * size)
        out = F.scaled_dot_product_attention(
            q, keys, values, mask, is_causal=mask is None, scale=scale, enable_gqa=heads != self.kv_heads
        )
        return out.transpose(1, 2).reshape(batch, seq, heads * size)
