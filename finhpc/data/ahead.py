"""Work done by a thread before its result is needed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
END = object()


def ahead(items: Iterator[T], count: int = 1) -> Iterator[T]:
    """Yield `items` in order; a thread makes up to `count` of them before they are consumed.

    An exception of `items` is raised where its item would be.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as pool:
        waiting: deque[Any] = deque(pool.submit(next, items, END) for _ in range(count))
        while (item := waiting.popleft().result()) is not END:
            waiting.append(pool.submit(next, items, END))
            yield item
