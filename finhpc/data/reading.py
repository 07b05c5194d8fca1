"""The stream of micro-batches one replica trains on, read in this process (no Ray)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from finhpc.data.order import Order, Visit, replica_mask
from finhpc.data.shards import Shards
from finhpc.errors import ConfigError

Batch = dict[str, npt.NDArray[Any]]
PIECE_TOKENS = 1 << 22  # tokens handed on at a time: 8 MB of 16-bit ids
VISIT_TOKENS = 1 << 25  # tokens shuffled together: as many shards as hold them, 64 MB of 16-bit ids


@dataclass(frozen=True)
class ReplicaStream:
    """What one replica reads from step `start_step` up to, not including, `stop_step`.

    `samples_per_step` counts all replicas. Raises `ConfigError` where the numbers do not fit.
    """

    shards: Shards
    seq_len: int
    seed: int
    start_step: int
    stop_step: int
    samples_per_step: int
    micro_batch_size: int
    replica: int = 0
    replicas: int = 1

    def __post_init__(self) -> None:
        self.shards.check_seq_len(self.seq_len)
        per_replica, rest = divmod(self.samples_per_step, self.replicas)
        if rest or per_replica < 1 or per_replica % self.micro_batch_size:
            raise ConfigError(
                f"{self.samples_per_step} samples a step do not split into {self.replicas} replicas of whole "
                f"micro-batches of {self.micro_batch_size}; use a multiple of {self.replicas * self.micro_batch_size}."
            )
        if not 0 <= self.replica < self.replicas:
            raise ConfigError(f"replica {self.replica} is none of 0..{self.replicas - 1}; give one of them.")
        if self.shards.num_samples("train", self.seq_len) < 1:
            raise ConfigError(f"data.shards={self.shards.folder} has no train sample; prepare more text.")

    @cached_property
    def order(self) -> Order:
        sizes = self.shards.shard_samples("train", self.seq_len)
        shards_a_visit = max(1, VISIT_TOKENS // (max(sizes) * self.seq_len))
        return Order(sizes, self.seed, shards_a_visit)

    def visits(self) -> list[Visit]:
        """The shard visits that hold this replica's samples, in stream order."""
        return self.order.visits(self.start_step * self.samples_per_step, self.stop_step * self.samples_per_step)

    def pieces(self, visit: Visit) -> Iterator[Batch]:
        """This replica's samples of one visit, in order: tokens (n, seq_len) as stored, sample (n,) int64."""
        positions = visit.first + np.arange(visit.size, dtype=np.int64)
        mine = replica_mask(positions, self.samples_per_step, self.replica, self.replicas)
        mine &= positions >= self.start_step * self.samples_per_step
        mine &= positions < self.stop_step * self.samples_per_step
        chosen = self.order.samples(visit)[mine]
        if not len(chosen):
            return
        held = {int(i): self.shards.read_shard("train", i).reshape(-1, self.seq_len) for i in self.order.shards(visit)}
        rows = max(1, PIECE_TOKENS // self.seq_len)
        for begin in range(0, len(chosen), rows):
            ids = chosen[begin : begin + rows]
            tokens = np.empty((len(ids), self.seq_len), next(iter(held.values())).dtype)
            shard_of = np.searchsorted(self.order.starts, ids, side="right") - 1
            for shard in np.unique(shard_of):
                inside = shard_of == shard
                tokens[inside] = held[int(shard)][ids[inside] - self.order.starts[shard]]
            yield {"tokens": tokens, "sample": ids}


def local_stream(stream: ReplicaStream) -> Iterator[Batch]:
    """The replica's micro-batches: tokens (micro_batch_size, seq_len) int64, sample (micro_batch_size,) int64."""
    held: list[Batch] = []
    size = stream.micro_batch_size
    for visit in stream.visits():
        for piece in stream.pieces(visit):
            held.append(piece)
            if sum(len(part["sample"]) for part in held) < size:
                continue
            joined = {name: np.concatenate([part[name] for part in held]) for name in piece}
            whole = len(joined["sample"]) // size * size
            for begin in range(0, whole, size):
                yield as_batch({name: values[begin : begin + size] for name, values in joined.items()})
            held = [{name: values[whole:] for name, values in joined.items()}]


def as_batch(columns: Batch) -> Batch:
    """A micro-batch as training takes it: both columns int64."""
    return {name: np.asarray(columns[name], dtype=np.int64) for name in ("tokens", "sample")}
