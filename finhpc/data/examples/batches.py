"""The order of examples, and the micro-batches of a run as packs.

The stream of examples is endless: epoch after epoch, each a permutation by (seed, epoch), nothing
dropped between. Step s takes the positions [s*G, (s+1)*G), G = examples per step, for any number of
replicas. Which examples of a step go together does not change its gradient; they are put together
so that prefixes are shared and no replica has much more to compute than another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace
from typing import Any

import numpy as np

from finhpc.data.examples.choices.candidates import Candidates
from finhpc.data.examples.choices.packs import label_pack
from finhpc.data.examples.choices.preferences import Preferences
from finhpc.data.examples.examples import Arrays
from finhpc.data.examples.layout import Group, Ints, Piece, groups, pack, piece, size
from finhpc.data.shards.order import permutation
from finhpc.models.packing.layout import IGNORED
from finhpc.settings.training import Parallel

MicroBatch = dict[str, Any]  # pack: int64 (1, FIELDS or more, T); sample, position: int64 (micro_batch_size,)


@dataclass(frozen=True)
class Batches:
    """Divides a run's examples into micro-batches.

    `share_prefix`: off if the adapter has dropout, which differs from example to example.
    `multiple`, `length`: what T is rounded up to, or is. `candidates`: the examples choose among them, instead of
    predicting the tokens of their answers.
    """

    parallel: Parallel
    seed: int
    share_prefix: bool = True
    multiple: int = 1
    length: int | None = None
    candidates: Candidates | Preferences | None = None

    def order(self, examples: int, epoch: int) -> Ints:
        """Return ids of the examples in the order of an epoch."""
        return permutation(examples, 3, self.seed, epoch)

    def samples(self, examples: int, step: int) -> Ints:
        """Return ids of the examples of a step, counted from 0, in stream order."""
        per_step = self.parallel.samples_per_step
        places = np.arange(step * per_step, (step + 1) * per_step)
        epochs, inside = divmod(places, examples)
        orders = {epoch: self.order(examples, epoch) for epoch in np.unique(epochs).tolist()}
        return np.array([orders[epoch][place] for epoch, place in zip(epochs.tolist(), inside.tolist(), strict=True)])

    def stream(self, train: Arrays, replica: int, step: int = 0) -> Iterator[MicroBatch]:
        """Yield a replica's micro-batches from `step` on, without end.

        `sample` are ids of examples, `position` their places in the stream, which do not depend on the number of
        replicas.
        """
        while True:
            yield from self.step(train, step, replica)
            step += 1

    def step(self, train: Arrays, step: int, replica: int) -> list[MicroBatch]:
        """Return a replica's micro-batches of one step."""
        samples = self.samples(len(train), step)
        pieces = [piece(train, int(index)) for index in samples]
        packs = self.parallel.micro_batches * self.parallel.replicas
        results: list[MicroBatch] = []
        for chosen in self._grouped(pieces)[replica]:
            array = self._packed(train, samples, pieces, chosen, packs, learned=True)
            position = step * len(samples) + np.array(chosen, np.int64)
            results.append({"pack": array, "sample": samples[chosen], "position": position})
        return results

    def held_out(self, arrays: Arrays, replica: int, limit: int | None = None) -> list[MicroBatch]:
        """Return a replica's packs of the first `limit` held-out examples (None: all), each in exactly one pack.

        All replicas have the same number; sizes differ by one at most, and a pack is empty only if there
        are fewer examples than replicas.
        """
        number = len(arrays) if limit is None else min(limit, len(arrays))
        order = np.argsort(arrays.source[:number], kind="stable")
        replicas = self.parallel.replicas
        packs = -(-number // (self.parallel.micro_batch_size * replicas)) * replicas
        pieces = [piece(arrays, int(index)) for index in order]
        results: list[MicroBatch] = []
        for chosen in np.array_split(np.arange(number), packs)[replica::replicas] if packs else []:
            array = self._packed(arrays, order, pieces, chosen.tolist(), packs, learned=False)
            results.append({"pack": array, "sample": order[chosen]})
        return results

    def _packed(
        self, arrays: Arrays, ids: Ints, pieces: list[Piece], chosen: list[int], packs: int, learned: bool
    ) -> Ints:
        """Return the pack of the `chosen` ones of a step's or an evaluation's examples, with these `ids`."""
        if self.candidates is not None:
            choices = [self.candidates.choice(arrays, int(ids[i]), learned) for i in chosen]
            return label_pack(choices, self.share_prefix, len(pieces), packs, self.multiple, self.length)
        part = [pieces[i] for i in chosen]
        targets = sum(int((one.target != IGNORED).sum()) for one in pieces)
        return pack(part, groups(part, self.share_prefix), targets, packs, self.multiple, self.length)

    def longest(self, arrays: Arrays) -> int:
        """Return a `length` that every pack of these examples fits."""
        longest = int(np.diff(arrays.offsets).max(initial=1))
        return -(-longest * self.parallel.micro_batch_size // self.multiple) * self.multiple

    def _grouped(self, pieces: list[Piece]) -> list[list[list[int]]]:
        """Return the indices of the examples in each micro-batch of each replica."""
        per, packs, replicas = self.parallel.micro_batch_size, self.parallel.micro_batches, self.parallel.replicas
        if packs * replicas == 1:
            return [[list(range(len(pieces)))]]
        results = groups(pieces, self.share_prefix)
        loose = tuple(group.members[0] for group in results if not group.prefix)
        whole = [group for group in results if group.prefix] + ([Group(loose, 0)] if loose else [])
        single = [Group(tuple(range(len(pieces))), 0)]
        ways = []
        for clusters in (whole, single):
            bins = _spread(pieces, clusters, packs * replicas, per)
            loads = [self._load(pieces, chosen) for chosen in bins]
            dealt = _deal(loads, replicas)
            busiest = max(sum(loads[i] for i in mine) for mine in dealt)
            ways.append((busiest, sum(loads), max(loads), [[bins[i] for i in mine] for mine in dealt]))
        return min(ways, key=lambda way: way[:3])[3]

    def _load(self, pieces: list[Piece], chosen: list[int]) -> int:
        part = [pieces[i] for i in chosen]
        return size(part, groups(part, self.share_prefix))


def _spread(pieces: Sequence[Piece], clusters: list[Group], bins: int, per: int) -> list[list[int]]:
    """Put `per` examples into each bin: each cluster into as few bins as possible, with even numbers of tokens."""
    room, load = [per] * bins, [0] * bins
    results: list[list[int]] = [[] for _ in range(bins)]
    at = 0
    for cluster in sorted(clusters, key=lambda cluster: (-len(cluster.members), cluster.members)):
        slots, left = [0] * bins, len(cluster.members)
        while left:
            slots[at] = min(left, room[at])
            left -= slots[at]
            room[at] -= slots[at]
            at += room[at] == 0
        free = [(load[i], i) for i in range(bins) if slots[i]]  # the least loaded first
        heapify(free)
        for member in sorted(cluster.members, key=lambda i: (-len(pieces[i].tokens), i)):
            target = free[0][1]
            slots[target] -= 1
            load[target] += len(pieces[member].tokens) - cluster.prefix
            results[target].append(member)
            if slots[target]:
                heapreplace(free, (load[target], target))
            else:
                heappop(free)
    return [sorted(chosen) for chosen in results]


def _deal(loads: list[int], replicas: int) -> list[list[int]]:
    """Give each replica equally many bins, the heaviest bin first to the replica with the least load."""
    dealt: list[list[int]] = [[] for _ in range(replicas)]
    for index in sorted(range(len(loads)), key=lambda i: (-loads[i], i)):
        free = [mine for mine in dealt if len(mine) < len(loads) // replicas]
        min(free, key=lambda mine: sum(loads[i] for i in mine)).append(index)
    return dealt
