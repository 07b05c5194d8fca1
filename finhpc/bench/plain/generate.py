"""transformers' own ways to continue many prompts greedily: padded to one length, and by its continuous batching."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from finhpc.errors import FinhpcError


class Continued(NamedTuple):
    """The new ids of each prompt, the seconds they took, and the bytes of the keys and values kept for them."""

    ids: list[list[int]]
    seconds: float
    cache_bytes: int


def padded(model: Any, prompts: Sequence[Sequence[int]], new: Sequence[int]) -> Continued:
    """`generate` of one batch, padded on the left, in which all go on until the last one ends."""
    from transformers import GenerationConfig

    model.set_attn_implementation("sdpa")
    begin, width = time.perf_counter(), max(map(len, prompts))
    rows = [[0] * (width - len(ids)) + [*ids] for ids in prompts]
    seen = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
    how = GenerationConfig(max_new_tokens=max(new), return_dict_in_generate=True, **_greedy(model))
    with torch.inference_mode():
        tokens, mask = (torch.tensor(x, device=model.device) for x in (rows, seen))
        out = model.generate(tokens, attention_mask=mask, generation_config=how)
    seconds = time.perf_counter() - begin
    ids = [row[width : width + count] for row, count in zip(out.sequences.tolist(), new, strict=True)]
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in out.past_key_values.layers)
    return Continued(ids, seconds, kept)


def continuous(model: Any, prompts: Sequence[Sequence[int]], new: Sequence[int], block: int, most: int) -> Continued:
    """Continuous batching over a paged cache of `block` tokens a page, from its start on; `most` tokens in a pass."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model.set_attn_implementation("sdpa")
    begin = time.perf_counter()
    how = GenerationConfig(**_greedy(model))
    blocks = sum(-(-(len(ids) + count) // block) for ids, count in zip(prompts, new, strict=True))
    sizes = ContinuousBatchingConfig(page_size=block, num_blocks=blocks, max_batch_tokens=most)
    found: dict[str, list[int]] = {}
    with model.continuous_batching_context_manager(
        generation_config=how, continuous_batching_config=sizes, block=True, timeout=5
    ) as manager:
        names = [manager.add_request([*ids], max_new_tokens=count) for ids, count in zip(prompts, new, strict=True)]
        while len(found) < len(names):
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                found[result.request_id] = result.generated_tokens
            elif result is None and not manager.is_running():
                raise FinhpcError("transformers' continuous batching ended before all requests had; see its log above.")
        seconds = time.perf_counter() - begin
        kept: int = manager.batch_processor.cache.cache_tensor.nbytes
    model.set_attn_implementation("sdpa")  # it leaves its own
    return Continued([found[name] for name in names], seconds, kept)


def _greedy(model: Any) -> dict[str, Any]:
    """Settings of greedy texts that do not end by themselves: their end token is one that the model does not have."""
    return {"do_sample": False, "eos_token_id": model.config.vocab_size, "pad_token_id": 0}
