"""Perplexity of a model on a split of prepared shards: over all its tokens, each counted once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from finhpc.data.shards.shards import Shards, Split
from finhpc.errors import ConfigError

PER_SAMPLE = ("example", "loss", "tokens")


def perplexity(
    model: nn.Module,
    vocab_size: int,
    shards: Shards,
    split: Split,
    seq_len: int,
    limit: int | None,
    batch_size: int,
    resamples: int,
    seed: int,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """exp of the mean loss over the next tokens of every sample, and each sample's loss.

    A sample is `seq_len` tokens and has `seq_len` - 1 targets, as in training. With `limit`, samples at
    even distances. Raises `ConfigError` where the ids do not fit the model's vocabulary or the split is empty.
    """
    if shards.manifest.vocab_size > vocab_size and (ids := shards.ids_of_text()) > vocab_size:
        raise ConfigError(
            f"data.shards={shards.folder} has a vocabulary of {ids:,}, the model "
            f"{vocab_size:,}; prepare the text with the model's tokeniser (finhpc prepare --tokenizer MODEL)."
        )
    sizes = shards.shard_samples(split, seq_len)
    total = sum(sizes)
    if not total:
        raise ConfigError(f"data.shards={shards.folder} has an empty {split} split; choose another --data.split.")
    n = total if limit is None else min(limit, total)
    chosen = np.arange(n, dtype=np.int64) * total // n
    losses: list[float] = []
    for samples in _samples(shards, split, seq_len, sizes, chosen):
        for at in range(0, len(samples), batch_size):
            losses += _losses(model, torch.from_numpy(samples[at : at + batch_size]))
    values = np.array(losses)
    loss = float(values.mean())
    draw = np.random.default_rng(seed)
    means = [float(values[draw.integers(n, size=n)].mean()) for _ in range(resamples)]
    ci = [_exp(float(q)) for q in np.quantile(means, [0.025, 0.975])] if means else None
    scores = {
        "perplexity": _exp(loss),
        "loss": loss,
        "ci95": {"perplexity": ci} if ci else None,
        "majority": None,
        "random": {"perplexity": float(vocab_size)},
        "examples": n,
        "examples_total": total,
        "tokens": n * (seq_len - 1),
        "unread": int((~np.isfinite(values)).sum()),
        "cut": 0,
    }
    rows = [{"example": int(i), "loss": x, "tokens": seq_len - 1} for i, x in zip(chosen, losses, strict=True)]
    return scores, rows


def _samples(
    shards: Shards, split: Split, seq_len: int, sizes: list[int], chosen: NDArray[np.int64]
) -> Iterator[NDArray[np.int64]]:
    """The chosen samples of each shard that has any, (samples, seq_len); `sizes`: samples of each shard."""
    start = 0
    for index, size in enumerate(sizes):
        inside = chosen[(chosen >= start) & (chosen < start + size)] - start
        start += size
        if len(inside):
            yield shards.read_shard(split, index).reshape(-1, seq_len)[inside].astype(np.int64)


def _losses(model: nn.Module, tokens: torch.Tensor) -> list[float]:
    """Mean loss of each row of `tokens` (rows, seq_len), in float32."""
    device = next(model.parameters()).device
    with torch.inference_mode():
        inputs = tokens.to(device)
        logits = model(inputs, use_cache=False).logits[:, :-1]
        return [
            float(torch.nn.functional.cross_entropy(row.float(), target))
            for row, target in zip(logits, inputs[:, 1:], strict=True)
        ]


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
