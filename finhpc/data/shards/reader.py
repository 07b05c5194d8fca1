"""The stream of micro-batches one replica trains on, read in this process (no Ray)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from finhpc.data.shards.order import Order, Visit, replica_mask
from finhpc.data.shards.shards import Shards
from finhpc.errors import ConfigError

Batch = dict[str, npt.NDArray[Any]]
PIECE_TOKENS = 1 << 22  # tokens handed on at a time: 8 MB of 16-bit ids
VISIT_TOKENS = 1 << 25  # tokens shuffled together: as many shards as hold them, 64 MB of 16-bit ids
SEGMENT_TOKENS = 1 << 24  # tokens of a replica read ahead together, at least; a visit is never cut


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

    def visits(self) -> Iterator[Visit]:
        """The shard visits that hold this replica's samples, in stream order."""
        return self.order.visits(self.start_step * self.samples_per_step, self.stop_step * self.samples_per_step)

    def segments(self) -> Iterator[list[Visit]]:
        """The visits in runs of about `SEGMENT_TOKENS` tokens of this replica, in stream order."""
        held: list[Visit] = []
        for visit in self.visits():
            held.append(visit)
            if sum(visit.size for visit in held) * self.seq_len >= SEGMENT_TOKENS * self.replicas:
                yield held
                held = []
        if held:
            yield held

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
    pieces = (piece for visit in stream.visits() for piece in stream.pieces(visit))
    return micro_batches(pieces, stream.micro_batch_size)


def micro_batches(pieces: Iterable[Batch], size: int) -> Iterator[Batch]:
    """Pieces of any number of rows, cut into batches of `size` rows, all int64; every row in its place.

    Rows that are left over at the end, fewer than `size`, are a last, smaller batch.
    """
    held: list[Batch] = []
    missing = size  # rows until the batch that `held` begins is full
    for piece in pieces:
        rows = len(piece["sample"])
        if rows < missing:
            held.append(piece)
            missing -= rows
            continue
        begin = missing if held else 0
        if held:
            yield _joined([*held, _rows(piece, 0, begin)])
        whole = begin + (rows - begin) // size * size
        for first in range(begin, whole, size):
            yield _joined([_rows(piece, first, first + size)])
        held = [_rows(piece, whole, rows)] if whole < rows else []
        missing = size - (rows - whole)
    if held:
        yield _joined(held)


def _rows(piece: Batch, begin: int, end: int) -> Batch:
    return {name: values[begin:end] for name, values in piece.items()}


def _joined(parts: list[Batch]) -> Batch:
    if len(parts) == 1:
        return {name: parts[0][name].astype(np.int64) for name in ("tokens", "sample")}
    return {name: np.concatenate([part[name] for part in parts], dtype=np.int64) for name in ("tokens", "sample")}
