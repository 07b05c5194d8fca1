"""A model's pass over new tokens of many requests, whose keys and values are cached: the inner loop of generation.

transformers' `generate` spends much of a small model's time in Python. Here a pass calls the model's own modules
(dense, low-rank, quantized, with adapters) by the names of its family, on one flat row of all tokens without padding.

Nothing is compiled. With `torch.compile` around all but the attention, a pass of SmolLM2-135M over 1, 8 and 32 requests
took 0.94 to 1.07 of the time on one CPU core, float32 and bfloat16, after 7 to 38 s of compiling for each number of
rows: reading weights takes most of it, and the rest is attention over blocks that differ in each pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from finhpc.generation.paged import PagedCache, dtype_of
from finhpc.models.attention import NAME, Attend, Scores
from finhpc.models.families.described import position_kinds
from finhpc.models.families.parts import Ends, rotate
from finhpc.models.families.registry import context_of, family_of


class Decoder:
    """`model`: of a registered family, in eval mode. Raises `ConfigError` for another family.

    `computed_tokens`: tokens that went through the model, counted in every pass. `cache_bytes`: of the last cache.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.config, self.family = model, model.config, family_of(model.config)
        self.context = context_of(self.config)
        self.ends = Ends.of(self.config)
        self.rotary = self.family.rotary(self.config)
        self.device = next(model.parameters()).device
        if self.rotary is not None:
            self.rotary.to(self.device)
        if self.family.whole_layers:
            self.config._attn_implementation = NAME
        self.computed_tokens = self.cache_bytes = 0
        self.blocks: list[tuple[Any, ...]] = []

    def find_modules(self) -> None:
        """Look up the model's modules again, after some were replaced."""
        self.blocks = [self._block(i) for i in range(self.config.num_hidden_layers)]

    def _block(self, i: int) -> tuple[Any, ...]:
        """Return the norm, attention and output projection, and the norm and MLP of a block; or its one layer."""
        if self.family.whole_layers:
            return (self.model.get_submodule(f"{self.family.blocks}.{i}"),)
        names, mlp = self.family.block_names(i, self.family.attention), self.family.block_names(i, self.family.mlp)
        projection = f"{names[1]}.{self.family.output_projection}"
        return tuple(self.model.get_submodule(name) for name in (*names, projection, *mlp))

    def make_cache(self, blocks: int, block_size: int, dtype: torch.dtype | None = None) -> PagedCache:
        """Return an empty cache, for the modules that the model has now; `dtype`: by default the fastest here."""
        self.find_modules()
        dtype = dtype or dtype_of(self.model.dtype, self.device.type)
        cache = PagedCache(self.config, blocks, block_size, dtype, self.device)
        self.cache_bytes = cache.bytes
        return cache

    @torch.inference_mode()
    def __call__(self, ids: Tensor, cache: PagedCache) -> Tensor:
        """Return the hidden states (tokens, width) of `ids` int64 (tokens,), the rows of `cache.begin`."""
        assert cache.current is not None
        family, module, positions = self.family, self.model.get_submodule, cache.current.positions[None]
        hidden = self.ends.embed(module(family.embedding), ids[None])
        if family.positions:
            hidden = hidden + module(family.positions)(positions)
        hidden = (self._layers if family.whole_layers else self._halves)(hidden, positions, cache)
        self.computed_tokens += len(cache.current.slots)
        return hidden[0]

    @torch.inference_mode()
    def predict(self, hidden: Tensor) -> Tensor:
        """Return the logits (rows, vocab) after hidden states (rows, width)."""
        module = self.model.get_submodule
        return self.ends.predict(module(self.family.norm)(hidden), module(self.family.head))

    def _halves(self, hidden: Tensor, positions: Tensor, cache: PagedCache) -> Tensor:
        rotated = rotate(self.rotary, hidden, positions, None)
        for i, (norm, attention, project, mlp_norm, mlp) in enumerate(self.blocks):
            q, k, v = (x[0] for x in self.family.heads(attention, norm(hidden), rotated))
            found = cache.attend(i, q, k, v, Scores(attention.scaling)).flatten(1)
            hidden = hidden + project(found.to(hidden.dtype)[None])
            hidden = hidden + mlp(mlp_norm(hidden))
        return hidden

    def _layers(self, hidden: Tensor, positions: Tensor, cache: PagedCache) -> Tensor:
        kinds = position_kinds(self.config)
        rotated = {kind: rotate(self.rotary, hidden, positions, kind) for kind in set(kinds)}

        def run(module: Any, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
            queries, keys, values = (x[0].transpose(0, 1) for x in (q, k, v))
            return cache.attend(module.layer_idx, queries, keys, values, scores)[None].to(q.dtype)

        for (layer,), kind in zip(self.blocks, kinds, strict=True):
            hidden = layer(hidden, attention_mask=Attend(run), position_embeddings=rotated[kind])
        return hidden
