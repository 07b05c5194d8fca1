"""A unit of work: the piece of the source that one task reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from finhpc.errors import DataError

UNIT_BYTES = 4 << 20  # input a unit aims at: a second of work, so that small sources share out evenly, too
Kind = Literal["jsonl", "parquet", "text", "archive", "hf", "docs"]


@dataclass(frozen=True)
class Unit:
    """Cheap to send to a task. What `start` and `stop` count depends on the kind: bytes or row groups."""

    kind: Kind
    paths: tuple[str, ...]
    start: int = 0
    stop: int = 0
    name: str = ""  # an archive's member; a hub data set's configuration
    size: int = 0  # bytes of input, for progress; 0: not known

    def __str__(self) -> str:
        return f"{self.paths[0]}{f' ({self.name})' if self.name else ''}"


class Faults:
    """What a broken record does: raise at once (`strict`), or be counted (`skip`)."""

    def __init__(self, on_error: str) -> None:
        self.strict = on_error == "strict"
        self.broken = 0

    def record(self, where: Callable[[int], str], number: int, problem: str, remedy: str) -> None:
        """A record that cannot be used; `where` (of the record's number) is asked only to show the place."""
        if self.strict:
            raise DataError(
                f"{where(number)}: {problem}; {remedy}, or count and skip such records with --on_error skip."
            )
        self.broken += 1
