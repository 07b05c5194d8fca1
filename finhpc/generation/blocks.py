"""Which blocks of a cache are free, in use, or kept for prompts that begin alike.

W. Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", 2023, section 4: a
request has a table from its logical blocks to physical ones, which it gets when it needs them and can share.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

IN_USE = 1 << 60  # stamp of a block in some table


@dataclass
class Table:
    """The physical blocks of a request, in the order of its tokens.

    `home`: free blocks in a row that no other table takes while there are others. Attention reads blocks that lie in a
    row without copying them.
    """

    blocks: list[int] = field(default_factory=list)
    home: range = range(0)


class Blocks:
    """`count` blocks of `size` tokens. A full block can be found by its key, see `chain`, until it is needed.

    `stamp`: IN_USE, 0 for a block that holds nothing, otherwise when it was given back: the oldest is needed first.
    """

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size
        self.users = [0] * count  # tables that have the block
        self.keys: dict[int, bytes] = {}  # of full blocks that can be found
        self.found: dict[bytes, int] = {}
        self.stamp = np.zeros(count, np.int64)
        self.at_home = np.zeros(count, np.int64)  # 1: in some table's home
        self.clock = self.used = 0

    @property
    def free(self) -> int:
        return self.count - self.used

    @property
    def shared(self) -> int:
        """Blocks in more than one table."""
        return sum(users > 1 for users in self.users)

    def blocks_of(self, tokens: int) -> int:
        """Return how many blocks hold so many tokens."""
        return -(-tokens // self.size)

    def settle(self, table: Table, count: int) -> None:
        """Find a home for so many blocks more: those in a row that were not used for the longest time, if any."""
        if not 0 < count <= self.count:
            return
        cost = np.where(self.at_home > 0, IN_USE, self.stamp)
        newest = np.lib.stride_tricks.sliding_window_view(cost, count).max(-1)
        begin = int(newest.argmin())
        if newest[begin] < IN_USE:
            table.home = range(begin, begin + count)
            self.at_home[begin : begin + count] = 1

    def grow(self, table: Table, count: int) -> list[int]:
        """Give a table its next blocks until it has `count`; there are enough free ones. Returns the new ones."""
        new = []
        for _ in range(count - len(table.blocks)):
            block = table.home[0] if table.home else -1
            if block >= 0:
                table.home = table.home[1:]
                self.at_home[block] = 0
            if block < 0 or self.users[block]:
                block = int((2 * self.stamp + self.at_home).argmin())
            if block in self.keys:
                del self.found[self.keys.pop(block)]
            self._use(block)
            new.append(block)
        table.blocks += new
        return new

    def _use(self, block: int) -> None:
        self.used += self.users[block] == 0
        self.users[block] += 1
        self.stamp[block] = IN_USE

    def findable(self, keys: Iterable[bytes]) -> list[int]:
        """Return the blocks of the first `keys` that can be found."""
        blocks = []
        for key in keys:
            if (block := self.found.get(key)) is None:
                break
            blocks.append(block)
        return blocks

    def share(self, table: Table, blocks: Sequence[int]) -> None:
        """Put blocks that were found into a table that is empty."""
        for block in blocks:
            self._use(block)
        table.blocks = list(blocks)

    def keep(self, block: int, key: bytes) -> None:
        """Make a full block findable, unless another one with the same content is."""
        if key not in self.found and block not in self.keys:
            self.keys[block], self.found[key] = key, block

    def release(self, table: Table, forget: bool = False) -> None:
        """Give back the blocks of a table, which is empty then; `forget`: their content must not be found again.

        The last blocks become the oldest, because fewer prompts share them.
        """
        for block in reversed(table.blocks):
            if forget and block in self.keys:
                del self.found[self.keys.pop(block)]
            self.users[block] -= 1
            if self.users[block] == 0:
                self.used -= 1
                self.clock += 1
                self.stamp[block] = self.clock if block in self.keys else 0
        self.at_home[list(table.home)] = 0
        table.blocks, table.home = [], range(0)


def chain(root: str, ids: Sequence[int], size: int, before: Sequence[bytes] = ()) -> list[bytes]:
    """Return the keys of the full blocks of `ids`: each depends on all ids up to its end, and on `root`.

    `before`: the first of them, computed earlier. `root` names what else keys and values depend on: the adapter.
    """
    keys = list(before)
    for i in range(len(keys), len(ids) // size):
        above = keys[-1] if keys else root.encode()
        content = array("q", ids[i * size : (i + 1) * size]).tobytes()
        keys.append(hashlib.sha256(above + content).digest())
    return keys
