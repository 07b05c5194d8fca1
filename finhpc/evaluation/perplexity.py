"""Perplexity of a model on a split of prepared shards: over all its tokens, each counted once."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from finhpc.data.shards.shards import Shards
from finhpc.errors import ConfigError
from finhpc.models.loading import load_model
from finhpc.settings.evaluate import EvaluateConfig
from finhpc.settings.pretrain import PretrainConfig

Losses = npt.NDArray[np.float64]
SAMPLE_LOSSES = "sample-losses.csv"  # in a run folder: the loss on each sample of `held_out_losses`


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


def held_out_losses(folder: Path, config: PretrainConfig, limit: int, device: torch.device) -> Losses:
    """Return the loss of a run's model in `folder` on each of at most `limit` held-out samples, in nats.

    The samples lie at even distances over the split, have `data.seq_len` tokens and one target less, and are scored in
    the precision and micro-batches of the run's own evaluations.
    """
    shards = Shards.open(str(config.data.shards))
    precision, size = config.train.precision, config.parallel.micro_batch_size
    model: Any = load_model(
        folder, torch.bfloat16 if precision == "bf16-weights" else torch.float32, device=str(device)
    )
    losses: list[float] = []
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        for _, samples in shards.spread("val", config.data.seq_len, limit):
            for batch in torch.from_numpy(samples).split(size):
                losses += row_losses(model, batch)
    return np.array(losses)


def row_losses(model: nn.Module, tokens: torch.Tensor) -> list[float]:
    """Return the mean loss of each row of `tokens` (rows, seq_len) over its seq_len - 1 targets, in float32."""
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
