"""The order in which samples are trained on: seeded, endless, the same for every topology.

A sample is `seq_len` contiguous tokens of a block; its id is its place in the train split, in file
order. An epoch visits every shard once, in a seeded order; a visit takes every sample of the shard
once, in a seeded order. The stream is all epochs, one after the other, nothing dropped between.
Step s of a run takes the stream positions [s*G, (s+1)*G), G = samples a step, and replica r of R
takes the r-th of R equal parts of each step. So the global order depends on the seed alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


class Visit(NamedTuple):
    """One shard in one epoch: stream positions [first, first + size)."""

    epoch: int
    shard: int
    first: int
    size: int


class Order:
    """Which sample stands at which position of the endless stream."""

    def __init__(self, shard_samples: Sequence[int], seed: int) -> None:
        """`shard_samples`: samples in each shard, in file order. Raises `ValueError` where there are none."""
        self.sizes = np.asarray(shard_samples, dtype=np.int64)
        if self.sizes.sum() < 1:
            raise ValueError("an order needs at least one sample")
        self.seed = seed
        self.starts: Ints = np.cumsum(self.sizes) - self.sizes
        self.epoch_samples = int(self.sizes.sum())

    def visits(self, start: int, stop: int) -> list[Visit]:
        """The visits that overlap the stream positions [start, stop), in stream order."""
        found: list[Visit] = []
        if stop <= start:
            return found
        for epoch in range(start // self.epoch_samples, -(-stop // self.epoch_samples)):
            order, ends = self._epoch(epoch)
            base = epoch * self.epoch_samples
            # The first visit that ends after `start`, up to the last that begins before `stop`.
            first = int(np.searchsorted(ends, start - base, side="right"))
            for shard, end in zip(order[first:].tolist(), ends[first:].tolist(), strict=True):
                size = int(self.sizes[shard])
                if base + end - size >= stop:
                    break
                if size:
                    found.append(Visit(epoch, shard, base + end - size, size))
        return found

    def samples(self, visit: Visit) -> Ints:
        """The shard's own sample numbers 0..size-1 in the order of this visit: (size,)."""
        return _permutation(visit.size, 2, self.seed, visit.epoch, visit.shard)

    def _epoch(self, epoch: int) -> tuple[Ints, Ints]:
        """The shards in the order of an epoch, and where in the epoch each visit ends."""
        order = _permutation(len(self.sizes), 1, self.seed, epoch)
        return order, np.cumsum(self.sizes[order])


def replica_mask(positions: Ints, samples_per_step: int, replica: int, replicas: int) -> Mask:
    """Which stream positions belong to a replica: its contiguous part of every step."""
    mask: Mask = positions % samples_per_step // (samples_per_step // replicas) == replica
    return mask


@lru_cache(maxsize=4)
def _permutation(n: int, *key: int) -> Ints:
    # Philox's raw stream and SeedSequence are fixed for ever; Generator.permutation may change with numpy.
    raw = np.random.Philox(np.random.SeedSequence(key)).random_raw(n)
    return np.argsort(raw, kind="stable")
