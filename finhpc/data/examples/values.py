"""Values of a record: text, a missing value or a label. Anything else is refused with its place.

`each` collects what is wrong in many records into one error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from decimal import Decimal
from typing import Any, Protocol, TypeVar

from finhpc.errors import ConfigError
from finhpc.textfile import NotTextError

SHOWN = 5  # kinds of faults that one error names
WHOLE = re.compile(r"([+-]?\d+)\.0*")
KINDS = ((bool, "the boolean"), (int, "the number"), (float, "the number"), (list, "a list"), (dict, "an object"))


def plain_text(value: Any) -> str:
    """Return a value that is text; "" for a missing one (null, NaN). Raises `NotTextError` for every other value."""
    if isinstance(value, str):
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise NotTextError("half a surrogate pair, which is not a character") from None
        return value
    if is_missing(value):
        return ""
    raise NotTextError(f"{shown(value)}, not text", "write it as text, in quotation marks")


def text_of(value: Any, name: str, where: str) -> str:
    """Return a field that is text, "" for a missing one; raises `ConfigError` with its place for every other value."""
    try:
        return plain_text(value)
    except NotTextError as error:
        raise ConfigError(f"{where}: {name} holds {error.problem}; {error.remedy}.") from None


def word_of(value: Any, name: str, where: str) -> str:
    """Return a label as written, without white space around it; integers (1, 1.0, "1.0") as their digits.

    "" for a missing value. Raises `ConfigError` with its place for every value that is neither text nor an integer.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float, Decimal)) and not is_missing(value) and value == value // 1:
        return str(int(value))
    if not isinstance(value, str) and not is_missing(value):
        raise ConfigError(f"{where}: {name} holds {shown(value)}, which is not a label; write a word or an integer.")
    return without_zeros(" ".join(text_of(value, name, where).split()))


def without_zeros(word: str) -> str:
    """Return the digits of an integer such as 1.0, any other word as it is."""
    whole = WHOLE.fullmatch(word)
    return whole[1] if whole else word


def is_missing(value: Any) -> bool:
    """Whether a value is null, or NaN as pandas writes a missing one."""
    return value is None or (isinstance(value, (float, Decimal)) and value != value)


def shown(value: Any) -> str:
    """A value that is not text, in words."""
    if value is None:
        return "null"
    for kind, words in KINDS:
        if isinstance(value, kind):
            return words if kind in (list, dict) else f"{words} {value}"
    return {"bytes": "bytes", "datetime": "a date", "date": "a date"}.get(
        type(value).__name__, f"a value of type {type(value).__name__}"
    )


class Placed(Protocol):
    """A record, or something made of one, with its place."""

    @property
    def where(self) -> str: ...


P = TypeVar("P", bound=Placed)
T = TypeVar("T")


def each(items: Iterable[P], work: Callable[[P], T]) -> list[T]:
    """Return `work` of every item. Raises one `ConfigError` with each kind of fault, its first place and its number."""
    results: list[T] = []
    faults: dict[str, list[str]] = {}
    for item in items:
        try:
            results.append(work(item))
        except ConfigError as error:
            for problem in error.problems:
                faults.setdefault(problem.removeprefix(f"{item.where}: "), []).append(item.where)
    lines = []
    for problem, places in list(faults.items())[:SHOWN]:
        more = f" The same applies to {len(places) - 1:,} more." if len(places) > 1 else ""
        lines.append(f"{places[0]}: {problem}{more}")
    if others := [place for places in list(faults.values())[SHOWN:] for place in places]:
        lines.append(f"{others[0]}: this and {len(others) - 1:,} more records cannot be used for other reasons.")
    if lines:
        raise ConfigError(lines)
    return results
