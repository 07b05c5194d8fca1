"""The learning rate of a step, which follows from the step alone: a resumed run goes on where it was.

Every schedule begins with a linear warm-up and ends at `optimizer.min_lr_ratio` of the peak:

- cosine: half a cosine from the peak to the end;
- linear: a straight line;
- wsd: the peak until the last `optimizer.cooldown_share` of the steps, then a straight line (S. Hu et al., "MiniCPM",
  2024: warm-up, stable, decay). A longer run shares its stable part.
"""

from __future__ import annotations

import math

from finhpc.settings.training import Optimizer


def learning_rate(settings: Optimizer, step: int, steps: int) -> float:
    """The learning rate of a step (from 1 to `steps`): a warm-up, at most half of the steps, then the schedule."""
    warmup = settings.warmup(steps)
    if step <= warmup:
        return settings.lr * step / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    if settings.schedule == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * done))
    elif settings.schedule == "linear":
        left = 1 - done
    else:
        cooldown = min(steps - warmup, max(1, round(settings.cooldown_share * steps)))
        left = min(1.0, (steps - step) / cooldown)
    return settings.lr * (settings.min_lr_ratio + (1 - settings.min_lr_ratio) * left)
