"""Which tokens of which requests the next pass computes, and their blocks."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from finhpc.generation.blocks import Blocks, chain
from finhpc.generation.decoder import Decoder
from finhpc.generation.paged import PagedCache, Span
from finhpc.generation.requests import Row
from finhpc.models.constant import filled
from finhpc.models.lora.multi_lora import Adapters


class Schedule:
    """Requests that wait or run, both in the order of arrival; all that run came before all that wait.

    `prefill_tokens`: tokens of prompts in a pass. `keeps`: blocks can be found again by what they hold. `roots`: number
    of an adapter -> what the keys of its blocks start with.
    """

    def __init__(self, blocks: Blocks, max_batch: int, prefill_tokens: int, keeps: bool) -> None:
        self.blocks, self.max_batch, self.prefill_tokens, self.keeps = blocks, max_batch, prefill_tokens, keeps
        self.waiting: deque[Row] = deque()
        self.running: list[Row] = []
        self.roots: dict[int, str] = {}
        self.fresh: list[int] = []  # blocks that were given out since the last pass
        self.preemptions = self.prefix_hits = 0

    @property
    def rows(self) -> list[Row]:
        return [*self.running, *self.waiting]

    def next_rows(self) -> list[Row]:
        """Choose the rows of the next pass, and give them blocks: what runs first, in the order of arrival."""
        budget, chosen, preemptions = self.prefill_tokens, [], self.preemptions
        for row in list(self.running):
            if row not in self.running:  # preempted for an earlier one
                continue
            new = len(row.ids) - row.computed
            row.new = new if new == 1 else min(new, budget)
            if row.new and self._grow(row):
                chosen.append(row)
                budget -= row.new if new > 1 else 0
        if self.preemptions > preemptions:
            return chosen
        while self.waiting and len(self.running) < self.max_batch and budget > 0 and self._admit(self.waiting[0]):
            row = self.waiting.popleft()
            self.running.append(row)  # all that run came before all that wait
            row.new = min(len(row.ids) - row.computed, budget)
            self._grow(row)
            chosen.append(row)
            budget -= row.new
        return chosen

    def _admit(self, row: Row) -> bool:
        """Give a waiting row the cached blocks it can share, if its other blocks fit next to those of running rows."""
        blocks, shared = self.blocks, []
        if self.keeps and row.shareable >= blocks.size:
            row.keys = chain(self._root(row), row.ids, blocks.size, row.keys)
            shared = blocks.findable(row.keys[: row.shareable // blocks.size])
        own = blocks.blocks_of(len(row.ids)) - sum(blocks.users[block] > 0 for block in shared)
        owed = sum(1 + blocks.blocks_of(len(other.ids)) - len(other.table.blocks) for other in self.running)
        if own + owed > blocks.free:
            return False
        blocks.share(row.table, shared)
        blocks.settle(row.table, blocks.blocks_of(row.most) - len(shared))
        row.computed = len(shared) * blocks.size
        self.prefix_hits += row.computed
        return True

    def _root(self, row: Row) -> str:
        return self.roots.get(row.adapter, str(row.adapter))

    def _grow(self, row: Row) -> bool:
        """Give a row the blocks of its next tokens; preempts the last rows if there are too few, perhaps this one."""
        blocks, end = self.blocks, row.computed + row.new
        while blocks.blocks_of(end) - len(row.table.blocks) > blocks.free:
            last = self.running.pop()
            self.reset(last)
            self.waiting.appendleft(last)
            self.preemptions += 1
            if last is row:
                return False
        self.fresh += blocks.grow(row.table, blocks.blocks_of(end))
        if self.keeps and end // blocks.size > row.computed // blocks.size:
            row.keys = chain(self._root(row), row.ids[:end], blocks.size, row.keys)
            for i in range(row.computed // blocks.size, end // blocks.size):
                blocks.keep(row.table.blocks[i], row.keys[i])  # stored before anything in this pass reads it
        return True

    def reset(self, row: Row) -> None:
        self.blocks.release(row.table)
        row.computed = 0

    def remove(self, row: Row, damaged: bool = False) -> None:
        """Forget a row that has ended; what it computed is not used again if it is damaged."""
        self.blocks.release(row.table, forget=damaged)
        (self.running if row in self.running else self.waiting).remove(row)


def hidden_states(
    decoder: Decoder, cache: PagedCache, schedule: Schedule, rows: list[Row], adapters: Adapters | None = None
) -> Tensor:
    """Compute a pass: the hidden states (tokens, width) of `rows`' new tokens, which it sorts as attention groups them.

    More hidden states may follow that belong to nothing. Without `adapters` the model is used as it is.
    """
    rows.sort(key=lambda row: (row.new, row.computed > 0, -row.computed))
    cache.clear(schedule.fresh)
    schedule.fresh = []
    ids = [token for row in rows for token in row.ids[row.computed : row.computed + row.new]]
    more = filled(len(ids)) - len(ids) if decoder.device.type == "cpu" else 0
    cache.begin([Span(row.table.blocks, row.computed, row.new) for row in rows], more)
    if adapters is not None:
        counts = [row.new for row in rows]
        counts[-1] += more
        adapters.choose([row.adapter for row in rows], counts)
    ids += [0] * more
    return decoder(torch.tensor(ids, device=decoder.device), cache)
