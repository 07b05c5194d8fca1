"""The order in which samples are trained on: seeded, endless, the same for every topology.

A sample is `seq_len` contiguous tokens of a block; its id is its place in the train split, in file
order. An epoch goes through all shards in a seeded order, some at a time: a visit takes every
sample of a group of shards once, in a seeded order, so that a shard that holds one part of the
corpus is mixed with others. The stream is all epochs, one after the other, nothing dropped between.
Step s of a run takes the stream positions [s*G, (s+1)*G), G = samples per step, and replica r of R
takes the r-th of R equal parts of each step. So the global order depends on the seed and the
shards alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


class Visit(NamedTuple):
    """One group of shards in one epoch: stream positions [first, first + size)."""

    epoch: int
    group: int
    first: int
    size: int


class Order:
    """The sample at each position of the endless stream."""

    def __init__(self, shard_samples: Sequence[int], seed: int, shards_per_visit: int = 1) -> None:
        """`shard_samples`: samples in each shard, in file order. Raises `ValueError` if there are none."""
        self.sizes = np.asarray(shard_samples, dtype=np.int64)
        if self.sizes.sum() < 1:
            raise ValueError("an order needs at least one sample")
        self.seed, self.shards_per_visit = seed, shards_per_visit
        self.starts: Ints = np.cumsum(self.sizes) - self.sizes
        self.epoch_samples = int(self.sizes.sum())

    def visits(self, start: int, stop: int) -> Iterator[Visit]:
        """Yield the visits that overlap the stream positions [start, stop), in stream order."""
        if stop <= start:
            return
        for epoch in range(start // self.epoch_samples, -(-stop // self.epoch_samples)):
            sizes = np.add.reduceat(
                self.sizes[self._epoch(epoch)], np.arange(0, len(self.sizes), self.shards_per_visit)
            )
            ends = np.cumsum(sizes)
            base = epoch * self.epoch_samples
            # The first visit that ends after `start`, up to the last that begins before `stop`.
            for group in range(int(np.searchsorted(ends, start - base, side="right")), len(ends)):
                size, first = int(sizes[group]), base + int(ends[group] - sizes[group])
                if first >= stop:
                    return
                if size:
                    yield Visit(epoch, group, first, size)

    def shards(self, visit: Visit) -> Ints:
        """Return indices of the shards that a visit reads."""
        begin = visit.group * self.shards_per_visit
        return self._epoch(visit.epoch)[begin : begin + self.shards_per_visit]

    def samples(self, visit: Visit) -> Ints:
        """Return ids of the visit's samples, (size,), in the order of training."""
        ids = [np.arange(self.sizes[shard]) + self.starts[shard] for shard in self.shards(visit)]
        return np.concatenate(ids)[permutation(visit.size, 2, self.seed, visit.epoch, visit.group)]

    def _epoch(self, epoch: int) -> Ints:
        """Return the shards in the order of an epoch."""
        return permutation(len(self.sizes), 1, self.seed, epoch)


def replica_mask(positions: Ints, samples_per_step: int, replica: int, replicas: int) -> Mask:
    """Return which stream positions belong to a replica: its contiguous part of every step."""
    mask: Mask = positions % samples_per_step // (samples_per_step // replicas) == replica
    return mask


@lru_cache(maxsize=4)
def permutation(n: int, *key: int) -> Ints:
    """Return 0 ... n-1 in an order drawn by the key, the same forever and everywhere."""
    # Philox's raw stream and SeedSequence are fixed forever; Generator.permutation may change with numpy.
    raw = np.random.Philox(np.random.SeedSequence(key)).random_raw(n)
    return np.argsort(raw, kind="stable")
