"""What a model in training chooses among the labels of held-out examples, or between the answers of pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from finhpc.models.packed_parts import Chosen, chosen
from finhpc.models.pipeline import PipelineLayer
from finhpc.training.batches import Ints
from finhpc.training.engine import Engine
from finhpc.training.finetuning.batches import PackedBatches
from finhpc.training.held_out import figures_of, held_out_loss

Choices = Mapping[int, tuple[int, int]]  # held-out example -> its label's place among the labels, and the chosen one's
Score = Callable[[Choices], float]


def evaluate(engine: Engine, source: PackedBatches, score: Score) -> dict[str, float] | None:
    """Return the figures of an evaluation as `finhpc.training.held_out` does, and `val_weighted_f1`: `score`'s value.

    The loss is that of the choices if they are what is learned.
    """
    loss: float | None
    loss, choices = held_out_choices(engine, source)
    if source.packing.candidates is None:
        loss = held_out_loss(engine, source)
    return None if loss is None else figures_of(loss) | {"val_weighted_f1": score(choices)}


def held_out_choices(engine: Engine, source: PackedBatches) -> tuple[float, dict[int, tuple[int, int]]]:
    """Return the mean loss of the choices among labels, and those of all workers."""
    loss, found = scored(engine, *source.choices(engine.replica))
    return loss, {example: (one.wanted, one.best) for example, one in found.items()}


def evaluate_pairs(engine: Engine, source: PackedBatches) -> dict[str, float] | None:
    """Return the figures of an evaluation, and `val_reward_accuracy`: the share of pairs whose chosen answer gained
    more over the reference than the rejected one.
    """
    if not source.scored:
        return None
    loss, found = scored(engine, *source.pairs(engine.replica, "held_out", source.limit))
    right = sum(one.scores[0] > one.scores[1] for one in found.values())
    return figures_of(loss) | {"val_reward_accuracy": right / len(found)}


def scored(engine: Engine, packs: Sequence[Ints], examples: Sequence[int]) -> tuple[float, dict[int, Chosen]]:
    """Return the mean loss of all workers' packs, and what is chosen for their examples, by these ids."""
    found: list[Chosen] = []

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
    return loss, {example: one for part in everyone for example, one in part.items()}
