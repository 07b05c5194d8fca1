"""The learning rate of a step, which follows from the step alone: a resumed run goes on where it was.

Every schedule begins with a linear warm-up and ends at `optimizer.min_lr_ratio` of the peak:

- cosine: half a cosine from the peak to the end;
- linear: a straight line;
- wsd: the peak until the last `optimizer.cooldown_share` of the steps, then a straight line (S. Hu et al., "MiniCPM",
  2024: warm-up, stable, decay). A longer run shares its stable part;
- restarts: the cosine, but after every `optimizer.restart_every` steps the rate rises to it again, linearly from 0 in
  `optimizer.restart_warmup_steps` (the jagged cosine of V. Lialin et al., "ReLoRA", 2023, section 3; LORO's code has it
  too). Loro's exact steps and relora's new pairs are at the same steps.
"""

from __future__ import annotations

import math

from finhpc.settings.training import Optimizer

# What each schedule reads of `finhpc.training.optimizers.kind.OWN`.
SCHEDULES: dict[str, tuple[str, ...]] = {
    "cosine": (),
    "linear": (),
    "wsd": ("cooldown_share",),
    "restarts": ("restart_every", "restart_warmup_steps"),
}


def learning_rate(settings: Optimizer, step: int, steps: int) -> float:
    """The learning rate of a step (from 1 to `steps`): a warm-up, at most half of the steps, then the schedule."""
    warmup = settings.warmup(steps)
    if step <= warmup:
        return settings.lr * step / warmup
    rise = 1.0
    if settings.schedule == "restarts" and step > settings.restart_every:
        into = (step - 1) % settings.restart_every + 1  # 1 in the first step of a cycle
        if into < settings.restart_warmup_steps:
            rise = into / settings.restart_warmup_steps
            step += settings.restart_warmup_steps - into  # it rises to the cosine at the end of the warm-up
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    if settings.schedule in ("cosine", "restarts"):
        left = 0.5 * (1 + math.cos(math.pi * done))
    elif settings.schedule == "linear":
        left = 1 - done
    else:
        cooldown = min(steps - warmup, max(1, round(settings.cooldown_share * steps)))
        left = min(1.0, (steps - step) / cooldown)
    return settings.lr * rise * (settings.min_lr_ratio + (1 - settings.min_lr_ratio) * left)
