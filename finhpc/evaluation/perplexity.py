"""Perplexity of a model on a split of prepared shards: over all its tokens, each counted once."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from finhpc.data.shards.shards import Shards
from finhpc.errors import ConfigError
from finhpc.evaluation.sample_losses import row_losses
from finhpc.settings.evaluate import EvaluateConfig


def perplexity(model: Any, shards: Shards, config: EvaluateConfig) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the scores, with exp of the mean loss over the next tokens of every sample, and a row per sample.

    A sample has `data.seq_len` tokens and one target less, as in training. `limit`: samples at even distances.
    Raises `ConfigError` if the ids do not fit the model's vocabulary or the split is empty.
    """
    split, seq_len = config.data.split, config.data.seq_len or shards.manifest.block_len
    vocab_size: int = model.config.vocab_size
    if shards.manifest.vocab_size > vocab_size and (ids := shards.ids_of_text()) > vocab_size:
        raise ConfigError(
            f"data.shards={shards.folder} has a vocabulary of {ids:,}, the model "
            f"{vocab_size:,}; prepare the text with the model's tokenizer (finhpc prepare --tokenizer MODEL)."
        )
    total = shards.num_samples(split, seq_len)
    if not total:
        raise ConfigError(f"data.shards={shards.folder} has an empty {split} split; choose another --data.split.")
    losses: list[float] = []
    chosen: list[int] = []
    for sample_ids, samples in shards.spread(split, seq_len, config.limit):
        chosen += sample_ids.tolist()
        for at in range(0, len(samples), config.batch_size):
            losses += row_losses(model, torch.from_numpy(samples[at : at + config.batch_size]))
    n = len(chosen)
    values = np.array(losses)
    loss = float(values.mean())
    draw = np.random.default_rng(config.seed)
    means = [float(values[draw.integers(n, size=n)].mean()) for _ in range(config.bootstrap)]
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
    rows = [{"example": i, "loss": x, "tokens": seq_len - 1} for i, x in zip(chosen, losses, strict=True)]
    return scores, rows


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
