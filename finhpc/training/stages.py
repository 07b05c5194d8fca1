"""The cut of a model into stages, balanced by the seconds that each part takes on this machine.

A cut is measured once and stored in the run folder, because a resumed run is only bit-equal to an unbroken one with
the same stages.
"""

from __future__ import annotations

import gc
import json
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from finhpc.files import write_json
from finhpc.models.families.parts import Part, describe_parts
from finhpc.models.families.registry import skeleton
from finhpc.models.initialize import random_fill
from finhpc.models.pipeline import PipelineLayer, parts_of
from finhpc.models.schedule import schedule_borders
from finhpc.settings.pretrain import PretrainConfig
from finhpc.settings.training import Parallel, Schedule
from finhpc.training.allocator import keep_freed_memory
from finhpc.training.optimizers.stage import make_optimizer

log = logging.getLogger(__name__)

REPEATS = 5  # after one to warm up
Clock = Callable[[], float]


@dataclass(frozen=True)
class Cut:
    """Stage i has the parts `borders[i]` to `borders[i + 1] - 1`; `costs_s`: seconds per micro-batch of each part."""

    schedule: Schedule
    workers: int  # of one pipeline
    kinds: list[str]  # of the parts
    costs_s: list[float]
    borders: list[int]

    def __str__(self) -> str:
        stages = " | ".join(describe_parts(self.kinds[a:b]) for a, b in pairwise(self.borders))
        seconds = ", ".join(f"{sum(self.costs_s[a:b]):.3g} s" for a, b in pairwise(self.borders))
        last = len(self.borders) - 2
        pairs = f"; worker i has stages i and {last} - i" if self.schedule == "dualpipev" else ""
        return f"{stages} ({seconds} per micro-batch{pairs})"


def measured_cut(config: PretrainConfig, hf_config: Any, device: torch.device) -> Cut:
    """Measure on all processes of the group at the same time, and cut; a single stage needs no measuring."""
    row, parallel = parts_of(hf_config, config.train.recompute), config.parallel
    kinds, schedule, workers = [part.kind for part in row], parallel.schedule, parallel.stages
    if workers == 1:
        return Cut(schedule, 1, kinds, [0.0] * len(kinds), [0, len(kinds)])
    seconds = measure_parts(config, hf_config, device)
    costs = [seconds[kind] for kind in kinds]
    borders = schedule_borders(row, costs, schedule, workers, parallel.micro_batches)
    return Cut(schedule, workers, kinds, costs, borders)


def saved_cut(config: PretrainConfig, hf_config: Any, device: torch.device, file: Path) -> Cut:
    """The cut in `file` if its schedule, workers and parts are the run's; else a measured one, which is written there.

    Every process of the group must call this, and all get the same cut; rank 0 reads and writes the file.
    """
    if config.parallel.stages == 1:
        return measured_cut(config, hf_config, device)
    kinds = [part.kind for part in parts_of(hf_config, config.train.recompute)]
    known: list[Cut | None] = [_read(file, config.parallel, kinds) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(known)
    if known[0] is not None:
        return known[0]
    cut = measured_cut(config, hf_config, device)
    if dist.get_rank() == 0:
        write_json(file, asdict(cut))
    log.info(f"stages cut by measured cost: {cut}")
    return cut


def _read(file: Path, parallel: Parallel, kinds: list[str]) -> Cut | None:
    if not file.exists():
        return None
    try:
        cut = Cut(**json.loads(file.read_text(encoding="utf-8")))
        stages = cut.workers * (2 if cut.schedule == "dualpipev" else 1)
        ends = [cut.borders[0], cut.borders[-1], len(cut.borders)]
        whole = ends == [0, len(cut.kinds), stages + 1] and all(a < b for a, b in pairwise(cut.borders))
    except (ValueError, TypeError, IndexError):
        whole = False
    if not whole:
        log.info(f"{file.name} is damaged: the stages are measured and cut again.")
        return None
    wanted = (parallel.schedule, parallel.stages, kinds)
    return cut if (cut.schedule, cut.workers, cut.kinds) == wanted else None


def measure_parts(
    config: PretrainConfig, hf_config: Any, device: torch.device, clock: Clock = time.perf_counter
) -> dict[str, float]:
    """Kind of part -> seconds per micro-batch: forward, backward, and its share of the optimizer's step.

    One block, or its halves, stands for all. The result is the mean over the processes of the group, which measure at
    the same time, as they will train. The process's random state is restored. `clock` returns seconds.
    """
    if device.type == "cpu":
        keep_freed_memory()  # as in training
    first = {part.kind: part for part in reversed(parts_of(hf_config, config.train.recompute))}
    kinds = sorted(first)
    seconds = torch.zeros(len(kinds), dtype=torch.float64, device=device)
    with torch.random.fork_rng(), _only_new_garbage():
        for i, kind in enumerate(kinds):
            dist.barrier()
            seconds[i] = _seconds(first[kind], config, hf_config, device, clock)
            gc.collect()
    dist.all_reduce(seconds)
    return dict(zip(kinds, (seconds / dist.get_world_size()).tolist(), strict=True))


@contextmanager
def _only_new_garbage() -> Iterator[None]:
    """Leave what exists already out of garbage collections in the block: searching it takes half a second each time."""
    freeze = not gc.get_freeze_count()
    if freeze:
        gc.freeze()
    try:
        yield
    finally:
        if freeze:
            gc.unfreeze()


def _seconds(part: Part, config: PretrainConfig, hf_config: Any, device: torch.device, clock: Clock) -> float:
    # The time does not depend on the values of a matrix, and the SVD of the spectral initialization is slow.
    model = skeleton(hf_config, config.train.recompute)
    precision, bits = config.train.precision, config.quantization.training_bits
    layer = PipelineLayer(part, model, device, random_fill(hf_config, 0, "normal"), precision, bits)
    shape = (config.parallel.micro_batch_size, config.data.seq_len)
    tokens = torch.randint(0, hf_config.vocab_size, shape, device=device)
    dtype = torch.bfloat16 if precision == "bf16-weights" else torch.float32
    hidden = torch.randn(*shape, hf_config.hidden_size, device=device, dtype=dtype)

    def passes() -> None:
        layer.derived.set()
        out = layer(tokens if part.kind == "embedding" else (hidden.detach().requires_grad_(), tokens))
        if isinstance(out, Tensor):
            out.backward()  # type: ignore[no-untyped-call]
        else:
            out[0].backward(torch.ones_like(out[0]))

    cost = median(passes, device, clock)
    named = dict(layer.parameters_by_name())
    if named:
        optimizer = make_optimizer(named, config.optimizer)

        def step() -> None:
            torch._foreach_norm([p.grad for p in named.values() if p.grad is not None])
            optimizer.step()

        cost += median(step, device, clock) / config.parallel.micro_batches
    return cost


def median(work: Callable[[], None], device: torch.device, clock: Clock = time.perf_counter) -> float:
    """The median seconds of `work` after a warm-up."""
    seconds = []
    for _ in range(1 + REPEATS):
        _synchronize(device)
        start = clock()
        work()
        _synchronize(device)
        seconds.append(clock() - start)
    return statistics.median(seconds[1:])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
