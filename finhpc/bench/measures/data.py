"""`finhpc bench data`: the stream that training reads, compared with plain Ray Data over the same parquet files.

Measured in turn:

- plain: `ray.data.read_parquet(train shards).iter_batches(batch_size=a micro-batch, batch_format="numpy")`, in the
  order in which files arrive, ids as stored; with Ray's defaults, then with its older reader and one block per file,
  which is faster, prefetching 1 and 4 batches; the fastest of them counts. Also without micro-batches: a whole block,
  which is a shard, as one batch
- stream: finhpc's, through Ray Data: seeded order, resumable, int64 micro-batches with sample ids
- local: the same micro-batches read in this process without Ray, the limit

then the stream with a consumer that computes for a fixed time per micro-batch. Ray and its processes are started, and
everything is read once, before the measurement.
"""

from __future__ import annotations

import hashlib
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from finhpc.bench.report import Row, publish
from finhpc.bench.settings import DataBench
from finhpc.bench.shards import random_shards
from finhpc.bench.timing import in_turn, median_ratio
from finhpc.data.shards.reader import ReplicaStream, Rows, local_stream
from finhpc.data.shards.shards import Shards
from finhpc.errors import ConfigError, DataError

BLOCKS = "plain, a block a file, no micro-batches"


@dataclass
class Reading:
    """One pass, in seconds. `own_cpu_s`: of this process; `task_cpu_s`: of Ray's, None if Ray runs elsewhere."""

    tokens: int
    wall_s: float
    first_batch_s: float
    wait_fraction: float | None
    own_cpu_s: float
    task_cpu_s: float | None

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.wall_s


def bench_data(settings: DataBench) -> dict[str, Any]:
    """Measure and publish what the module's docstring says.

    `ratios`: `stream_over_ray_data` (tokens/s, the same micro-batches), `stream_over_ray_data_blocks`
    (tokens/s, Ray's whole blocks), `stream_wait_fraction` (share of the consumer's time). Raises
    `DataError` if the stream is not in the seeded order or does not resume in it, `ConfigError`
    if the settings do not fit the shards.
    """
    from finhpc.cluster.connect import ray_cluster

    began = time.perf_counter()
    for name in ("ray.data", "ray.data._internal", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)
    out = Path(os.path.abspath(os.path.expanduser(settings.bench.out)))
    with _shards(settings, out) as (shards, made), ray_cluster():
        files, stream = _work(settings, shards)
        check(stream)
        ways = _ways(settings, files, stream)
        in_turn({name: lambda way=way: way().wall_s for name, way in ways.items()}, 1)  # type: ignore[misc]
        passes: dict[str, list[Reading]] = {name: [] for name in ways}

        def measure(name: str) -> float:
            passes[name].append(ways[name]())
            return passes[name][-1].tokens_per_s

        pace = in_turn({name: lambda name=name: measure(name) for name in ways}, settings.bench.repeats)  # type: ignore[misc]
        conditions = _conditions(settings, shards, made, stream)
    same_batch = [name for name in pace if name.startswith("plain") and name != BLOCKS]
    best = max(same_batch, key=lambda name: statistics.median(pace[name]))
    waits = [reading.wait_fraction for reading in passes["stream, consumer"]]
    ratios = {
        "stream_over_ray_data": median_ratio(pace["stream"], pace[best]),
        "stream_over_ray_data_blocks": median_ratio(pace["stream"], pace[BLOCKS]),
        "stream_wait_fraction": statistics.median(wait for wait in waits if wait is not None),
    }
    rows = [_row(name, readings, best) for name, readings in passes.items()]
    return publish("data", str(out), conditions | {"compared_with": best}, rows, ratios, began)


def check(stream: ReplicaStream) -> None:
    """Raise `DataError` unless Ray gives exactly the seeded order, from the start and from the middle."""
    from finhpc.data.shards.stream import ray_stream

    middle = stream.stop_step // 2
    if _digest(ray_stream(stream)) != _digest(local_stream(stream)):
        raise DataError("the stream through Ray is not the seeded order; this is a bug of finhpc: please report it.")
    resumed = ray_stream(replace(stream, start_step=middle))
    if _digest(resumed) != _digest(islice(local_stream(stream), middle, None)):
        raise DataError(f"the stream resumed at step {middle} is not the rest of the whole; please report it.")


def _digest(batches: Iterable[Rows]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(batch["sample"].tobytes())
        digest.update(batch["tokens"].tobytes())
    return digest.hexdigest()


def _ways(settings: DataBench, files: list[str], stream: ReplicaStream) -> dict[str, Callable[[], Reading]]:
    from finhpc.data.shards.stream import ray_stream

    block_len, size = stream.shards.manifest.block_len, stream.micro_batch_size * stream.seq_len
    rows = max(1, size // block_len)
    rate = settings.consumer_tokens_per_s
    some = max(2, settings.consumer_tokens // size)

    def plain(batch: int | None, prefetch: int, tuned: bool = False) -> Iterator[int]:
        for columns in _plain(files, batch, prefetch, tuned):
            yield len(columns["tokens"]) * block_len

    def stepped(batches: Iterable[Rows]) -> Iterator[int]:
        for columns in batches:
            yield columns["tokens"].size

    # If possible, the consumed part crosses from one segment into the next.
    border = sum(visit.size for visit in next(stream.segments())) // stream.micro_batch_size
    start = min(max(0, border - some // 2), max(0, stream.stop_step - some))
    crossing = replace(stream, start_step=start)
    return {
        "plain, defaults": lambda: read(plain(rows, 1)),
        "plain, a block a file, prefetch 1": lambda: read(plain(rows, 1, True)),
        "plain, a block a file, prefetch 4": lambda: read(plain(rows, 4, True)),
        BLOCKS: lambda: read(plain(None, 2, True)),
        "stream": lambda: read(stepped(ray_stream(stream))),
        "local": lambda: read(stepped(local_stream(stream))),
        "stream, consumer": lambda: read(stepped(ray_stream(crossing)), rate, some),
    }


def _plain(files: list[str], batch: int | None, prefetch: int, tuned: bool) -> Iterator[Rows]:
    """`tuned`: with Ray's older reader of parquet and a block for each file, both of which are faster here."""
    import ray

    context = ray.data.DataContext.get_current()
    before = context.use_datasource_v2, context.enable_progress_bars
    context.use_datasource_v2, context.enable_progress_bars = before[0] and not tuned, False
    try:
        dataset = ray.data.read_parquet(files, override_num_blocks=len(files) if tuned else None)
    finally:
        context.use_datasource_v2, context.enable_progress_bars = before
    yield from dataset.iter_batches(batch_size=batch, batch_format="numpy", prefetch_batches=prefetch)


def read(batches: Iterator[int], rate: float | None = None, most: int | None = None) -> Reading:
    """Take `most` batches (None: all), given as token counts; with a `rate`, compute tokens/rate seconds after each.

    The share of waiting counts from the second batch on: the first one is `first_batch_s`.
    """
    own, tasks = _cpu_s()
    began = time.perf_counter()
    tokens, first, waited = 0, 0.0, 0.0
    asked = began
    for i, size in enumerate(islice(batches, most)):
        now = time.perf_counter()
        if i:
            waited += now - asked
        else:
            first = now - began
        tokens += size
        if rate:
            _compute(size / rate)
        asked = time.perf_counter()
    wall = time.perf_counter() - began
    if hasattr(batches, "close"):
        batches.close()
    own_after, tasks_after = _cpu_s()
    task_cpu_s = None
    if tasks is not None and tasks_after is not None:
        task_cpu_s = sum(seconds - tasks.get(pid, 0.0) for pid, seconds in tasks_after.items())
    return Reading(
        tokens=tokens,
        wall_s=wall,
        first_batch_s=first,
        wait_fraction=waited / (wall - first) if rate else None,
        own_cpu_s=own_after - own,
        task_cpu_s=task_cpu_s,
    )


def _compute(seconds: float) -> None:
    """Keep one core busy, as a training thread does: a sleeping consumer would wake to cold caches."""
    values, end = np.ones(1 << 14, np.float32), time.perf_counter() + seconds
    while time.perf_counter() < end:
        np.sqrt(values, out=values)


def _cpu_s() -> tuple[float, dict[int, float] | None]:
    """CPU seconds of this process and of each Ray process below it (None: those run elsewhere)."""
    process = psutil.Process()
    own = sum(process.cpu_times()[:2])
    if os.environ.get("RAY_ADDRESS"):
        return own, None
    tasks = {}
    for child in process.children(recursive=True):
        with suppress(psutil.Error):
            tasks[child.pid] = sum(child.cpu_times()[:2])
    return own, tasks


def _row(name: str, readings: list[Reading], best: str) -> Row:
    def middle(values: list[Any]) -> float | None:
        return None if None in values else statistics.median(values)

    return {
        "way": name + (" *" if name == best else ""),
        "tokens": readings[0].tokens,
        "tokens_per_s": middle([reading.tokens_per_s for reading in readings]),
        "wall_s": middle([reading.wall_s for reading in readings]),
        "first_batch_s": middle([reading.first_batch_s for reading in readings]),
        "wait_fraction": middle([reading.wait_fraction for reading in readings]),
        "own_cpu_s": middle([reading.own_cpu_s for reading in readings]),
        "task_cpu_s": middle([reading.task_cpu_s for reading in readings]),
    }


def _conditions(settings: DataBench, shards: Shards, made: bool, stream: ReplicaStream) -> Row:
    import ray

    return {
        "ray": ray.__version__,
        "ray_cpus": ray.cluster_resources().get("CPU"),
        "shards": "random" if made else str(shards.folder),
        "stored": shards.manifest.dtype,
        "block_len": shards.manifest.block_len,
        "seq_len": stream.seq_len,
        "micro_batch_size": stream.micro_batch_size,
        "stream_gives": "int64, seeded order",
        "plain_gives": f"{shards.manifest.dtype}, order of arrival",
        "padding": "none",
        "consumer_tokens_per_s": settings.consumer_tokens_per_s,
        "repeats": settings.bench.repeats,
    }


def _work(settings: DataBench, shards: Shards) -> tuple[list[str], ReplicaStream]:
    """The first files that hold `tokens`, for the plain ways, and a stream of as many tokens."""
    block_len, size = shards.manifest.block_len, settings.micro_batch_size * settings.data.seq_len
    if size % block_len and block_len % size:
        raise ConfigError(
            f"micro_batch_size x data.seq_len = {size} tokens and the shards' block_len={block_len} do not divide each "
            "other, so that plain batches would be of another size; change one of the two."
        )
    files, tokens = [], 0
    for shard in shards.manifest.splits["train"]:
        if tokens < settings.tokens:
            files.append(str(shards.folder / shard.file))
            tokens += shard.blocks * block_len
    if tokens < 2 * size:
        raise ConfigError(
            f"data.shards={shards.folder} holds {tokens} train tokens, less than two micro-batches of {size}; "
            "use more text or smaller micro-batches."
        )
    stream = ReplicaStream(
        shards=shards,
        seq_len=settings.data.seq_len,
        seed=0,
        start_step=0,
        stop_step=tokens // size,
        samples_per_step=settings.micro_batch_size,
        micro_batch_size=settings.micro_batch_size,
    )
    return files, stream


@contextmanager
def _shards(settings: DataBench, out: Path) -> Iterator[tuple[Shards, bool]]:
    """The shards to measure with, and whether they are random ones."""
    if settings.data.shards:
        yield Shards.open(os.path.expanduser(settings.data.shards)), False
        return
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="shards-", dir=out) as folder:
        yield random_shards(Path(folder), settings.tokens, settings.data.seq_len), True
