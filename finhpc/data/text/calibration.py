"""A few blocks of text that show what goes into each layer, for whitening."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from finhpc.data.text import sources
from finhpc.data.text.formats import Faults
from finhpc.data.text.tokenizer import Encoder
from finhpc.errors import ConfigError
from finhpc.settings.decompose import Calibration
from finhpc.settings.prepare import PrepareConfig

SPREAD = 8  # times as many tokens are read as are used, so that they come from more documents


def calibration_blocks(config: Calibration, tokenizer: Path) -> Tensor:
    """Return token ids, int64 (samples, seq_len): blocks at even distances in the text.

    `tokenizer`: folder of the model's tokenizer. Raises `ConfigError` if the text has fewer tokens than samples x
    seq_len, or cannot be read as `finhpc prepare` reads it.
    """
    if not config.source:
        raise ConfigError("calibration.source is not set; whitening needs text: give --calibration.source.")
    as_prepare = PrepareConfig(source=config.source, text_field=config.text_field)
    encoder = Encoder(tokenizer)
    needed = config.samples * config.seq_len
    units, _ = sources.units(as_prepare)
    texts = (text for unit in units for text in sources.read(unit, as_prepare, Faults("strict")))
    pieces: list[np.ndarray] = []
    tokens = 0
    for text in texts:
        pieces.append(encoder.encode([text])[0])
        tokens += len(pieces[-1])
        if tokens >= SPREAD * needed:
            break
    if tokens < needed:
        raise ConfigError(
            f"calibration.source has {tokens:,} tokens, fewer than calibration.samples x calibration.seq_len = "
            f"{config.samples} x {config.seq_len} = {needed:,}; give more text, or use fewer or shorter samples."
        )
    ids = np.concatenate(pieces).astype(np.int64)
    blocks = ids[: len(ids) // config.seq_len * config.seq_len].reshape(-1, config.seq_len)
    chosen = np.linspace(0, len(blocks) - 1, config.samples).round().astype(np.int64)
    return torch.from_numpy(blocks[chosen])
