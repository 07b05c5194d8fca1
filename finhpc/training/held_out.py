"""Scores of a model in training on held-out samples: their loss, and what it chooses among labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from finhpc.models.packed_parts import chosen
from finhpc.models.pipeline import PipelineLayer
from finhpc.training.batches import BatchSource, PackedBatches
from finhpc.training.engine import Engine

Choices = Mapping[int, tuple[int, int]]  # held-out example -> its label's place among the labels, and the chosen one's
Score = Callable[[Choices], float]


def evaluate(engine: Engine, source: BatchSource, score: Score | None) -> dict[str, float] | None:
    """Return the figures of an evaluation, the same on every worker; None if there are no held-out samples.

    `val_loss` in nats and `val_perplexity`; with `score` also `val_weighted_f1`, its value for the chosen labels.
    """
    figures: dict[str, float] = {}
    loss: float | None = None
    if score is not None:
        assert isinstance(source, PackedBatches)
        of_choices, choices = held_out_choices(engine, source)
        figures["val_weighted_f1"] = score(choices)
        if source.packing.candidates is not None:  # they are what is learned
            loss = of_choices
    if loss is None and (loss := held_out_loss(engine, source)) is None:
        return None
    perplexity = math.exp(loss) if loss < 700 else float("inf")
    return {"val_loss": loss, "val_perplexity": perplexity} | figures


def held_out_loss(engine: Engine, source: BatchSource) -> float | None:
    """The mean loss over every held-out sample, for any topology; None if there are no held-out samples.

    The engine needs complete micro-batches, equally many per replica. Copies of a sample fill them, and their share
    is subtracted from the mean.
    """
    held_out = source.held_out(engine.replica)
    if not held_out:
        return None
    loss = engine.evaluate(held_out)
    copies, filler = source.filler()
    if filler is not None:
        loss += (loss - engine.evaluate([filler])) * copies / source.scored
    return loss


def held_out_choices(engine: Engine, source: PackedBatches) -> tuple[float, dict[int, tuple[int, int]]]:
    """Return the mean loss of the choices among labels, and those of all workers."""
    packs, examples = source.choices(engine.replica)
    found: list[tuple[int, int]] = []

    def look(layer: PipelineLayer, inputs: Any) -> None:
        found.extend(chosen(inputs[0], layer.part_modules[0], engine.hf_config))

    heads = [layer for layer in engine.layers if layer.part.kind == "head"]  # on last stages
    hooks = [layer.register_forward_pre_hook(look) for layer in heads]
    try:
        loss = engine.evaluate([torch.from_numpy(pack) for pack in packs])
    finally:
        for hook in hooks:
            hook.remove()
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, dict(zip(examples, found, strict=True)) if heads else {})
    return loss, {example: choice for one in everyone for example, choice in one.items()}
