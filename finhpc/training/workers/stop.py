"""Workers that are asked to stop do so after the same step, with a checkpoint.

The command asks by a byte in the run's file `.stop`, which is there from the start: a network disk may hide a new file
for a minute, but not the content of one that is opened. Worker 0 reads it and sets the last step in the process
group's store, where the others look after each step.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch.distributed as dist

FILE = ".stop"
POLL_S = 0.5
# A worker ends step N at the earliest when worker 0 has begun step N - 1: it needs gradients or losses from there, but
# may read a loss a step late. So nobody has ended the second step from now.
AHEAD = 2


def reset(run: Path) -> None:
    """Take back an earlier request."""
    (run / FILE).write_bytes(b"")


def request(run: Path) -> None:
    """Ask the workers of a run to save a checkpoint and return."""
    with open(run / FILE, "wb") as file:
        file.write(b"1")
        file.flush()
        os.fsync(file.fileno())


def is_requested(run: Path) -> bool:
    try:
        return bool((run / FILE).read_bytes())
    except FileNotFoundError:
        return False


class Stop:
    """Decides at which step the workers of one start stop. `attempt` is the same for all of them."""

    def __init__(self, run: Path, world_rank: int, attempt: str) -> None:
        self.run, self.world_rank, self.key = run, world_rank, f"stop-{attempt}"
        self.store = dist.distributed_c10d._get_default_store()
        self.step: int | None = None
        self._next_look = 0.0

    def is_due(self, step: int) -> bool:
        """Whether the run stops after `step`, which this worker has just taken; all workers ask after every step."""
        if self.step is None and self.world_rank == 0:
            self._look(step)
        elif self.step is None and self.store.check([self.key]):
            self.step = int(self.store.get(self.key))
        if self.step is not None and step > self.step:
            raise RuntimeError(f"worker {self.world_rank} took step {step}, after step {self.step}, the last one.")
        return step == self.step

    def _look(self, step: int) -> None:
        if (now := time.monotonic()) < self._next_look:
            return
        self._next_look = now + POLL_S
        if is_requested(self.run):
            self.step = step + AHEAD
            self.store.set(self.key, str(self.step))
