"""The reference of DPO: what the model thinks of both answers of every pair before training begins."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch.distributed as dist

from finhpc.data.examples.choices.preferences import Preferences, Scores
from finhpc.data.examples.examples import SPLITS
from finhpc.training.engine import Engine
from finhpc.training.finetuning.batches import PackedBatches
from finhpc.training.finetuning.choices import scored

log = logging.getLogger(__name__)


def begin_with_reference(engine: Engine, source: PackedBatches, folder: Path) -> None:
    """Score all pairs with the model as it begins, and write the scores into the run folder, for a resumed run.

    New adapters begin without an effect (those of loftq make up for what quantizing lost), so this is the base, or the
    adapter that training continues from. TRL computes it in advance, too, with `precompute_ref_log_probs`. Every worker
    keeps all scores.
    """
    preferences = source.packing.candidates
    assert isinstance(preferences, Preferences)
    found: dict[str, Scores] = {}
    for name in SPLITS:
        arrays = getattr(source.examples, name)
        if not len(arrays):
            continue
        log.info(f"scoring the {len(arrays):,} pairs of {name} with the model as it begins")
        _, of_pairs = scored(engine, *source.pairs(engine.replica, name))
        found[name] = np.array([of_pairs[index].scores for index in range(len(arrays))], np.float64)
    preferences.reference = found
    if dist.get_rank() == 0:
        preferences.save(folder)
