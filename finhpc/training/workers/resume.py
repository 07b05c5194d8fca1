"""What workers do together when they resume: agree on the newest undamaged checkpoint, and load it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

from finhpc.errors import CheckpointError
from finhpc.training.checkpoint import MANIFEST, Checkpoint, key_of, open_checkpoint
from finhpc.training.optimizers.stage import init_state, moment_names, moments
from finhpc.training.workers.replicas import rows_of

if TYPE_CHECKING:
    from finhpc.training.engine import Engine

log = logging.getLogger(__name__)

ROUND_BYTES = 1 << 30  # verified by each worker between two reports to the others


def latest_valid(
    folder: Path, world_rank: int = 0, workers: int = 1, progress: Callable[[], None] = lambda: None
) -> Checkpoint | None:
    """The newest checkpoint whose files are all as they were written; None if none was ever completed.

    All workers call this together. Each verifies its part of the files, and `progress` is called after each gigabyte,
    also for the files of others. Newer damaged checkpoints are logged and removed, so that they do not count among the
    stored ones. Raises `CheckpointError` on all workers if all are damaged, and removes none: the user decides whether
    to begin at step 0 again.
    """
    damaged: dict[Path, str] = {}
    paths: list[Any] = [None]
    if world_rank == 0:  # a save without a manifest was interrupted, which is not damage
        paths = [[path for path in sorted(folder.glob("step_*"), reverse=True) if (path / MANIFEST).exists()]]
    for path in _from_first(paths, workers)[0]:
        opened = [_open(path)] if world_rank == 0 else [None]
        latest, error = _from_first(opened, workers)[0]
        error = error or _verify(latest, world_rank, workers, progress)
        if error:
            damaged[path] = error
            continue
        for other, why in damaged.items():
            log.info(f"checkpoint {other.name} is damaged ({why}); it is removed and {path.name} is used.")
            if world_rank == 0:
                shutil.rmtree(other, ignore_errors=True)
        return latest  # type: ignore[no-any-return]
    if damaged:
        raise CheckpointError(
            f"every checkpoint in {folder} is damaged ({'; '.join(damaged.values())}); restore one of them from a "
            f"copy, or remove {folder} to begin at step 0."
        )
    return None


def _from_first(values: list[Any], workers: int) -> list[Any]:
    """The values of worker 0, on all workers."""
    if workers > 1:
        dist.broadcast_object_list(values)
    return values


def _open(path: Path) -> tuple[Checkpoint | None, str | None]:
    try:
        return open_checkpoint(path), None
    except CheckpointError as error:
        return None, str(error)


def _verify(checkpoint: Checkpoint, world_rank: int, workers: int, progress: Callable[[], None]) -> str | None:
    """Verify all files, each by one worker; return what is wrong with the first damaged one."""
    files = checkpoint.manifest["files"]
    by_size = sorted(files, key=lambda name: (-files[name]["bytes"], name))
    pieces = checkpoint.verify_files(by_size[world_rank::workers])
    state: tuple[bool, str | None] = (True, None)  # whether this worker has more to read, and what is wrong
    while True:
        if state[0]:
            state = _read(pieces)
        everyone: list[Any] = [state]
        if workers > 1:
            everyone = [None] * workers
            dist.all_gather_object(everyone, state)
        progress()
        if error := next((error for _, error in everyone if error), None):
            return str(error)
        if not any(more for more, _ in everyone):
            return None


def _read(pieces: Any) -> tuple[bool, str | None]:
    """Verify ROUND_BYTES more."""
    size = 0
    try:
        for piece in pieces:
            size += piece
            if size >= ROUND_BYTES:
                return True, None
    except CheckpointError as error:
        return False, str(error)
    return False, None


def what_is_wrong(path: Path, workers: int) -> str | None:
    """What is wrong with a checkpoint by its manifest and its files' sizes, on all workers; None if nothing is."""
    error: str | None = None
    try:
        open_checkpoint(path).check_sizes()
    except CheckpointError as damage:
        error = str(damage)
    found: str | None = _from_first([error], workers)[0]
    return found


def load_state(engine: Engine, latest: Checkpoint) -> None:
    """Load the weights of this stage, and the moments of the rows that this replica updates."""
    engine.set_step(latest.step)
    init_state(engine.optimizer, latest.step)
    latest.read_into("param", {name: (p.data, 0) for name, p in engine.trained_parameters().items()})
    for prefix in moment_names(engine.optimizer):
        targets = {}
        for name, parameter in engine.updated.items():
            if prefix in (state := moments(engine.optimizer, parameter)):
                rows = engine.share[name] if engine.sharded else None
                targets[name] = (state[prefix], rows.start if rows else 0)
        latest.read_into(prefix, targets)


def stored_state(engine: Engine) -> dict[str, Tensor]:
    """The weights and moments that this replica writes into a checkpoint, by key: its share of the stage's."""
    trained, owned = engine.trained_parameters(), set(engine.owned_names())
    state: dict[str, Tensor] = {}
    for name, rows in engine.share.items():
        if name not in owned:  # the last stage's copy of a tied matrix, or dropped by method 3
            continue
        state[key_of("param", name, rows)] = rows_of(trained[name].detach(), rows)
        for prefix, value in moments(engine.optimizer, engine.updated[name]).items():
            state[key_of(prefix, name, rows)] = value if engine.sharded else rows_of(value, rows)
    return state
