"""The journal of a run: one JSON line per event, appended to a file in the run folder.

Training reports here and nowhere else, so no server, screen or network can stop a step. The progress bar and MLflow
read the file at their own pace.

A record has `kind`, `time` (unix seconds) and the fields of its kind, which have the names of the metrics. The kinds
are `start`, `train`, `eval`, `checkpoint`, `memory`, `system`, `message`, `finished`, `failed`.

Floats round-trip exactly. JSON has no NaN or infinity: they are written as the strings "nan",
"inf", "-inf", and read back as floats wherever such a string stands as a value.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from finhpc.files import strict_json

# One writer per file, because appends of two machines to one file on a network disk can overlap: world rank 0 writes
# the first, the driver process the second.
WORKER_FILE = "journal.jsonl"
DRIVER_FILE = "driver.jsonl"

Record = dict[str, Any]

log = logging.getLogger(__name__)
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class Journal:
    """The writing end. Every record is one `os.write`, so a killed writer leaves at most one cut line."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        self._torn = self._ends_in_cut_line()

    def write(self, kind: str, **fields: Any) -> None:
        record = {"kind": kind, "time": time.time(), **fields}
        line = strict_json(record) + "\n"
        # A line cut by an earlier writer's death must not swallow this one.
        data = (("\n" if self._torn else "") + line).encode()
        written = os.write(self._file, data)
        self._torn = written < len(data)
        if self._torn:
            reason = f"No space left on device: {written} of {len(data)} bytes were written"
            raise OSError(errno.ENOSPC, reason, str(self.path))

    def close(self) -> None:
        os.close(self._file)

    def _ends_in_cut_line(self) -> bool:
        size = os.fstat(self._file).st_size
        return size > 0 and os.pread(self._file, 1, size - 1) != b"\n"


def read(path: str | Path, offset: int = 0, limit: int | None = None) -> tuple[list[Record], int]:
    """The complete records from byte `offset` on, at most `limit`, and the offset to continue from.

    A cut last line is left for later, because it may still be being written. A cut line that others follow will never
    be complete; it is skipped with a warning.
    """
    records: list[Record] = []
    if not Path(path).exists():  # nothing was written yet
        return records, offset
    with open(path, "rb") as file:
        if offset > os.fstat(file.fileno()).st_size:
            log.warning(
                "%s is shorter than what was read of it before (%d bytes); reading from its start", path, offset
            )
            offset = 0
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n") or len(records) == limit:
                break
            if line.strip():
                records += _parse(line, path, offset)
            offset += len(line)
    return records, offset


def latest(records: Iterable[Record], kind: str) -> dict[int, Record]:
    """Step -> record of one kind; the last one, because a resumed run repeats steps."""
    return {record["step"]: record for record in records if record["kind"] == kind}


def _parse(line: bytes, path: str | Path, offset: int) -> list[Record]:
    try:
        record = _restore(json.loads(line))
        if isinstance(record, dict) and "kind" in record and "time" in record:
            return [record]
    except ValueError:  # also what broken UTF-8 raises
        pass
    log.warning("%s: skipped a broken line of %d bytes at byte %d (its writer was killed)", path, len(line), offset)
    return []


def _restore(value: Any) -> Any:
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    if isinstance(value, dict):
        return {key: _restore(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_restore(inner) for inner in value]
    return value
