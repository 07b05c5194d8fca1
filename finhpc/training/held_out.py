"""The loss of a model in training on held-out samples."""

from __future__ import annotations

import math

from finhpc.training.batches import BatchSource
from finhpc.training.engine import Engine


def evaluate(engine: Engine, source: BatchSource) -> dict[str, float] | None:
    """Return the figures of an evaluation, the same on every worker; None if there are no held-out samples."""
    loss = held_out_loss(engine, source)
    return None if loss is None else figures_of(loss)


def figures_of(loss: float) -> dict[str, float]:
    """`val_loss` in nats and `val_perplexity`."""
    return {"val_loss": loss, "val_perplexity": math.exp(loss) if loss < 700 else float("inf")}


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
