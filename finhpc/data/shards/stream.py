"""The same stream of micro-batches through Ray Data.

A running Ray Data execution keeps a thread busy in the process that reads from it, most of all while that process is
slower than the reading, and would take a core from training. So the stream is read in segments: one execution of a
second or less fills Ray's object store with some tens of megabytes of samples and ends; training takes its
micro-batches from there without a copy, and nothing else runs until the next segment is due.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from finhpc.data.ahead import ahead
from finhpc.data.shards.order import Visit
from finhpc.data.shards.reader import ReplicaStream, Rows, micro_batches
from finhpc.errors import DataError

if TYPE_CHECKING:
    from ray.data import Dataset

MAX_TASKS = 4  # reading tasks per segment; a task reads whole visits
BLOCK_BYTES = 8 << 20  # that a task passes on at a time


def ray_stream(stream: ReplicaStream) -> Iterator[Rows]:
    """Yield the replica's micro-batches, int64; one segment is read ahead of the one that is consumed.

    Raises `DataError` for a shard that is damaged, missing, or not the one that was prepared.
    """
    return micro_batches(_pieces(stream), stream.micro_batch_size)


def _pieces(stream: ReplicaStream) -> Iterator[Rows]:
    for pieces in ahead(map(partial(_read, stream), stream.segments())):
        while pieces:
            yield pieces.popleft()  # a piece that was consumed leaves the object store


def _read(stream: ReplicaStream, visits: list[Visit]) -> deque[Rows]:
    """Read one segment to its end; the arrays are in Ray's object store, not in this process."""
    from ray.exceptions import RayError

    iterator = ray_dataset(stream, visits).iterator()
    try:
        return deque(iterator.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0))
    except RayError as error:
        raise _cause(error, stream) from None


def ray_dataset(stream: ReplicaStream, visits: list[Visit]) -> Dataset:
    """Return the replica's samples of some visits, in order, as a lazy Ray dataset with the columns of `Rows`.

    Two reading tasks run at a time. They reserve no CPU: reading is light, and training's workers may have reserved
    all of them.
    """
    import ray

    rows = [dict(zip(Visit._fields, map(int, visit), strict=True)) for visit in visits]
    tasks = min(len(rows), MAX_TASKS)
    dataset = ray.data.from_items(rows, override_num_blocks=tasks)
    pool = ray.data.TaskPoolStrategy(size=min(tasks, 2))
    dataset = dataset.map_batches(partial(_read_visits, stream=stream), batch_size=1, num_cpus=0, compute=pool)
    # Set after the last step: every step copies the context of the one before it.
    dataset.context.target_max_block_size = BLOCK_BYTES
    dataset.context.execution_options.preserve_order = True
    dataset.context.enable_progress_bars = False
    dataset.context.raise_original_map_exception = True  # not wrapped in Ray's
    return dataset


def _read_visits(rows: Rows, stream: ReplicaStream) -> Iterator[Rows]:
    for values in zip(*(rows[name].tolist() for name in Visit._fields), strict=True):
        yield from stream.pieces(Visit(*values))


def _cause(error: BaseException, stream: ReplicaStream) -> DataError:
    """Return the `DataError` inside an error of Ray's, without Ray's traceback, or one with Ray's message."""
    inner: BaseException | None = error
    while inner is not None:
        if type(inner) is DataError:
            return DataError(str(inner).splitlines()[0])
        inner = getattr(inner, "cause", None) or inner.__cause__
    last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    return DataError(f"reading {stream.shards.folder} failed: {last}; see Ray's logs, then rerun the command.")
