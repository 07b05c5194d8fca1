"""The loss of a model on each sample of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from finhpc.data.shards.shards import Shards
from finhpc.models.base import load_base
from finhpc.settings.pretrain import PretrainConfig

Losses = npt.NDArray[np.float64]
SAMPLE_LOSSES = "sample-losses.csv"  # in a run folder: the loss on each sample of `held_out_losses`


def held_out_losses(folder: Path, config: PretrainConfig, limit: int, device: torch.device) -> Losses:
    """Return the loss of a run's model in `folder` on each of at most `limit` held-out samples, in nats.

    The samples lie at even distances over the split, have `data.seq_len` tokens and one target less, and are scored in
    the precision and micro-batches of the run's own evaluations.
    """
    shards = Shards.open(str(config.data.shards))
    precision, size = config.train.precision, config.parallel.micro_batch_size
    model: Any = load_base(folder, torch.bfloat16 if precision == "bf16-weights" else torch.float32, device)
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
