"""The same stream of micro-batches through Ray Data, one dataset a replica."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from finhpc.data.order import Visit
from finhpc.data.reading import Batch, ReplicaStream, as_batch

if TYPE_CHECKING:
    from ray.data import DataIterator, Dataset

MAX_TASKS = 512  # visits are grouped into at most this many tasks, so that a long run plans quickly
BLOCK_BYTES = 8 << 20  # what a task hands on at a time: bounds memory and the wait for the first batch


def ray_dataset(stream: ReplicaStream) -> Dataset:
    """The replica's samples as a lazy Ray dataset: columns `tokens` (as stored) and `sample`, in stream order.

    Two reading tasks run at a time. They reserve no CPU: reading is light, and a task that waits
    for its replica's consumer must not keep another replica's task from starting.
    """
    import ray

    visits = stream.visits()
    rows = [dict(zip(Visit._fields, map(int, visit), strict=True)) for visit in visits]
    dataset = ray.data.from_items(rows, override_num_blocks=max(1, min(len(rows), MAX_TASKS)))
    two = ray.data.TaskPoolStrategy(size=2)
    dataset = dataset.map_batches(partial(_read_visits, stream=stream), batch_size=1, num_cpus=0, compute=two)
    # Set after the last step: every step copies the context of the one before it.
    dataset.context.target_max_block_size = BLOCK_BYTES
    dataset.context.execution_options.preserve_order = True
    dataset.context.enable_progress_bars = False
    return dataset


def worker_batches(iterator: DataIterator, micro_batch_size: int, prefetch: int = 4) -> Iterator[Batch]:
    """The micro-batches of a replica's iterator: tokens (micro_batch_size, seq_len) and sample, both int64."""
    for columns in iterator.iter_batches(
        batch_size=micro_batch_size, batch_format="numpy", prefetch_batches=prefetch, drop_last=False
    ):
        yield as_batch(columns)


def _read_visits(rows: Batch, stream: ReplicaStream) -> Iterator[Batch]:
    for values in zip(*(rows[name].tolist() for name in Visit._fields), strict=True):
        yield from stream.pieces(Visit(*values))
