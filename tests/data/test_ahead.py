"""Items that a thread makes before they are consumed."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from finhpc.data.ahead import ahead


def test_as_many_as_wanted_are_made_before_they_are_consumed() -> None:
    made: list[int] = []
    three = threading.Event()

    def items() -> Iterator[int]:
        for i in range(6):
            made.append(i)
            if len(made) == 3:
                three.set()
            yield i

    consumed = ahead(items(), 2)
    assert next(consumed) == 0
    assert three.wait(10), "the two after the consumed one"
    assert len(made) == 3, "no more"
    assert list(consumed) == [1, 2, 3, 4, 5]


def test_an_error_comes_in_its_place_and_an_unfinished_thread_ends() -> None:
    before = set(threading.enumerate())

    def items() -> Iterator[int]:
        yield 1
        raise ValueError("damaged")

    consumed = ahead(items(), 3)
    assert next(consumed) == 1
    with pytest.raises(ValueError, match="damaged"):
        next(consumed)
    endless = ahead(iter(int, 1), 2)
    next(endless)
    endless.close()
    left = set(threading.enumerate()) - before
    assert not [thread for thread in left if thread.name.startswith("read-ahead")]
