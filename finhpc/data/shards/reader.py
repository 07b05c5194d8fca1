"""Which samples one replica reads, and in which pieces.

`stream.py` reads them through Ray Data, as training does; `local_stream` reads them in this process.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from finhpc.data.shards.decoded import decoded
from finhpc.data.shards.order import Order, Visit, replica_mask
from finhpc.data.shards.shards import Shards, Tokens
from finhpc.errors import ConfigError

# tokens (n, seq_len); sample (n,), ids of samples; position (n,), their places in the global stream
Rows = dict[str, npt.NDArray[Any]]
PIECE_TOKENS = 1 << 22  # tokens passed on at a time: 8 MB of 16-bit ids
VISIT_TOKENS = 1 << 25  # tokens shuffled together: as many shards as hold them, 64 MB of 16-bit ids
SEGMENT_TOKENS = 1 << 24  # tokens of a replica that are read ahead together, at least


@dataclass(frozen=True)
class ReplicaStream:
    """The samples that one replica reads from step `start_step` up to, not including, `stop_step`.

    `samples_per_step` counts all replicas. Raises `ConfigError` if the numbers do not fit together.
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
                f"{self.samples_per_step} samples per step do not split into {self.replicas} replicas of whole "
                f"micro-batches of {self.micro_batch_size}; use a multiple of {self.replicas * self.micro_batch_size}."
            )
        if not 0 <= self.replica < self.replicas:
            raise ConfigError(f"replica={self.replica} is not in 0..{self.replicas - 1}; use one of these.")
        if self.shards.num_samples("train", self.seq_len) < 1:
            raise ConfigError(f"data.shards={self.shards.folder} has no training sample; prepare more text.")

    @cached_property
    def order(self) -> Order:
        sizes = self.shards.shard_samples("train", self.seq_len)
        shards_per_visit = max(1, VISIT_TOKENS // (max(sizes) * self.seq_len))
        return Order(sizes, self.seed, shards_per_visit)

    def visits(self) -> Iterator[Visit]:
        """Yield the visits of shards that contain this replica's samples, in stream order."""
        return self.order.visits(self.start_step * self.samples_per_step, self.stop_step * self.samples_per_step)

    def segments(self) -> Iterator[list[Visit]]:
        """Yield the visits in runs of about `SEGMENT_TOKENS` tokens of this replica, in stream order."""
        segment: list[Visit] = []
        for visit in self.visits():
            segment.append(visit)
            if sum(visit.size for visit in segment) * self.seq_len >= SEGMENT_TOKENS * self.replicas:
                yield segment
                segment = []
        if segment:
            yield segment

    def pieces(self, visit: Visit) -> Iterator[Rows]:
        """Yield this replica's samples of one visit, in order, with tokens as they are stored."""
        positions = visit.first + np.arange(visit.size, dtype=np.int64)
        mine = replica_mask(positions, self.samples_per_step, self.replica, self.replicas)
        mine &= positions >= self.start_step * self.samples_per_step
        mine &= positions < self.stop_step * self.samples_per_step
        samples, positions = self.order.samples(visit)[mine], positions[mine]
        if not len(samples):
            return
        blocks = {int(i): self._blocks(int(i)).reshape(-1, self.seq_len) for i in self.order.shards(visit)}
        rows = max(1, PIECE_TOKENS // self.seq_len)
        for begin in range(0, len(samples), rows):
            ids = samples[begin : begin + rows]
            tokens = np.empty((len(ids), self.seq_len), next(iter(blocks.values())).dtype)
            shard_of = np.searchsorted(self.order.starts, ids, side="right") - 1
            for shard in np.unique(shard_of):
                inside = shard_of == shard
                tokens[inside] = blocks[int(shard)][ids[inside] - self.order.starts[shard]]
            yield {"tokens": tokens, "sample": ids, "position": positions[begin : begin + rows]}

    def _blocks(self, shard: int) -> Tokens:
        """Return a shard's blocks, which replicas share with the others on their machine."""
        if self.replicas == 1:
            return self.shards.read_shard("train", shard)
        ahead = max(VISIT_TOKENS, SEGMENT_TOKENS * self.replicas)  # at most twice this is in use at a time
        return decoded(self.shards, shard, 4 * ahead * np.dtype(self.shards.manifest.dtype).itemsize)


def local_stream(stream: ReplicaStream) -> Iterator[Rows]:
    """Yield the replica's micro-batches, read in this process."""
    pieces = (piece for visit in stream.visits() for piece in stream.pieces(visit))
    return micro_batches(pieces, stream.micro_batch_size)


def micro_batches(pieces: Iterable[Rows], size: int) -> Iterator[Rows]:
    """Cut pieces of any number of rows into batches of `size` rows, all int64, in their order.

    Fewer than `size` rows left at the end are a last, smaller batch.
    """
    waiting: list[Rows] = []
    missing = size  # rows until the batch that `waiting` begins is full
    for piece in pieces:
        rows = len(piece["sample"])
        if rows < missing:
            waiting.append(piece)
            missing -= rows
            continue
        begin = missing if waiting else 0
        if waiting:
            yield _joined([*waiting, _part(piece, 0, begin)])
        whole = begin + (rows - begin) // size * size
        for first in range(begin, whole, size):
            yield _joined([_part(piece, first, first + size)])
        waiting = [_part(piece, whole, rows)] if whole < rows else []
        missing = size - (rows - whole)
    if waiting:
        yield _joined(waiting)


def _part(piece: Rows, begin: int, end: int) -> Rows:
    return {name: values[begin:end] for name, values in piece.items()}


def _joined(parts: list[Rows]) -> Rows:
    if len(parts) == 1:
        return {name: values.astype(np.int64) for name, values in parts[0].items()}
    return {name: np.concatenate([part[name] for part in parts], dtype=np.int64) for name in parts[0]}
