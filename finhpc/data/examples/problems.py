"""One error for what is wrong in many records: each kind of fault once, with its first place and its number."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

from finhpc.errors import ConfigError

SHOWN = 5  # kinds of faults that are named, of all


class Placed(Protocol):
    """A record, or what was made of one, that knows where it stands."""

    @property
    def where(self) -> str: ...


P = TypeVar("P", bound=Placed)
T = TypeVar("T")


def each(items: Iterable[P], work: Callable[[P], T]) -> list[T]:
    """Return `work` of every item; raises one `ConfigError` with what is wrong in all of them."""
    made: list[T] = []
    faults: dict[str, list[str]] = {}
    for item in items:
        try:
            made.append(work(item))
        except ConfigError as error:
            for problem in error.problems:
                faults.setdefault(problem.removeprefix(f"{item.where}: "), []).append(item.where)
    if faults:
        raise ConfigError(_grouped(faults))
    return made


def _grouped(faults: dict[str, list[str]]) -> list[str]:
    grouped = []
    for problem, places in list(faults.items())[:SHOWN]:
        more = f" The same holds for {len(places) - 1:,} more." if len(places) > 1 else ""
        grouped.append(f"{places[0]}: {problem}{more}")
    if left := [place for places in list(faults.values())[SHOWN:] for place in places]:
        grouped.append(f"{left[0]}: this and {len(left) - 1:,} more records cannot be used for other reasons.")
    return grouped
