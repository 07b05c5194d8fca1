"""A plugin that stops a run's workers for a moment where a test wants to meet them.

The command and its workers import it with `--plugins tests.runs.pauses`; a test must not.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from finhpc.training.checkpoint import Checkpointer
from finhpc.training.journal import Journal
from tests.runs.runs import HALTED_STEP

AT_THE_END_S = 5.0

_complete, _write = Checkpointer._complete, Journal.write


def complete(saver: Checkpointer, path: Path, step: int, extra: dict[str, Any]) -> None:
    """Halt the first save of `HALTED_STEP` before its manifest, in a run folder with a file `halt`."""
    halt = saver.folder.parent / "halt"
    if step == HALTED_STEP and halt.exists():
        halt.rename(halt.with_name("halted"))
        time.sleep(600)
    _complete(saver, path, step, extra)


def write(journal: Journal, kind: str, **fields: Any) -> None:
    """Stay a while after the last record, so that a test finds the process still there."""
    _write(journal, kind, **fields)
    if kind == "finished":
        time.sleep(AT_THE_END_S)


Checkpointer._complete = complete  # type: ignore[method-assign]
Journal.write = write  # type: ignore[method-assign]
