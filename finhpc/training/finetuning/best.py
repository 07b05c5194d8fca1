"""The evaluation with the best metric so far, as the manifest of every checkpoint records it."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finhpc.training.checkpoint import BEST_STEP, STOPPED_EARLY, Checkpoint
from finhpc.training.workers.resume import what_is_wrong

log = logging.getLogger(__name__)

LOWER_IS_BETTER = {"val_loss"}
STATE = "best"  # a key of a manifest


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
        return {BEST_STEP: self.step, STATE: state, STOPPED_EARLY: self.stops}

    def resume(self, latest: Checkpoint, workers: int) -> None:
        """Continue with the best evaluation that `latest` records, unless its checkpoint was lost; all call this.

        That happens only if newer checkpoints, one of a better evaluation among them, were damaged.
        """
        manifest = latest.manifest
        step = manifest.get(BEST_STEP, latest.step)
        if lost := what_is_wrong(latest.path.with_name(f"step_{step:08d}"), workers):
            log.info(
                f"the checkpoint of the best evaluation, of step {step}, is lost ({lost}); the best is searched for "
                f"anew after step {latest.step}."
            )
        elif BEST_STEP in manifest:
            self.step = manifest[BEST_STEP]
            self.value, self.seen, self.waited = (manifest[STATE][key] for key in ("value", "seen", "waited"))
