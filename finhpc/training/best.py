"""The evaluation with the best metric so far, as the manifest of every checkpoint records it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LOWER_IS_BETTER = {"val_loss"}
STEP, STATE, STOPPED = "best_step", "best", "stopped_early"  # keys of a manifest


@dataclass
class Best:
    """Compares the evaluations of a run by `metric`, a key of their records; the first of equal ones counts.

    `patience`: evaluations without a better one after which the run stops; None: it takes all steps. `step`: that of
    the best one, None before the first; `seen`: that of the newest one.
    """

    metric: str
    patience: int | None = None
    step: int | None = None
    value: float = math.nan
    seen: int = 0
    waited: int = 0  # evaluations since the best one

    def improves(self, record: Mapping[str, Any]) -> bool:
        """Take an evaluation in; returns whether it is the best so far. One that was seen before changes nothing."""
        step, value = record["step"], record[self.metric]
        if step <= self.seen:
            return False
        self.seen = step
        ahead = self.value - value if self.metric in LOWER_IS_BETTER else value - self.value
        if math.isfinite(value) and (self.step is None or ahead > 0):
            self.step, self.value, self.waited = step, value, 0
            return True
        self.waited += 1
        return False

    @property
    def stops(self) -> bool:
        """Whether the run has waited long enough for a better one."""
        return self.patience is not None and self.step is not None and self.waited >= self.patience

    @property
    def labels(self) -> dict[str, Any]:
        """Its entries of a manifest."""
        if self.step is None:
            return {}
        state = {"value": self.value, "seen": self.seen, "waited": self.waited}
        return {STEP: self.step, STATE: state, STOPPED: self.stops}

    def resume(self, manifest: Mapping[str, Any]) -> None:
        """Continue from what a checkpoint's manifest records."""
        if STEP in manifest:
            self.step = manifest[STEP]
            self.value, self.seen, self.waited = (manifest[STATE][key] for key in ("value", "seen", "waited"))
