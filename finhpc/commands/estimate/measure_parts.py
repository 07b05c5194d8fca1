"""Seconds of each kind of part on this machine, measured by as many processes at once as will train, or by one."""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from finhpc.errors import TrainingFailedError
from finhpc.models.lora.model import LoraModel, LoraPipelineLayer
from finhpc.models.packing.layout import layout_of
from finhpc.planning.model import hf_config_of_settings
from finhpc.settings.estimate import EstimateConfig
from finhpc.settings.pretrain import PretrainConfig
from finhpc.training.stages import measure_parts, median

GROUP = "group"  # the file through which the processes find each other
SECONDS = "seconds.json"
CPU = torch.device("cpu")


def part_seconds(config: EstimateConfig) -> dict[str, float]:
    """Kind of part -> seconds per micro-batch, forward and backward with its share of the optimizer's step.

    Takes seconds to a minute. Raises `TrainingFailedError` if a process dies.
    """
    workers = config.parallel.workers
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes: list[Any] = [context.Process(target=_measure, args=(i, config, folder)) for i in range(workers)]
        try:
            for process in processes:
                process.start()
            for process in processes:
                process.join()
        finally:
            for process in processes:
                process.kill()
        codes = [process.exitcode for process in processes if process.exitcode]
        if codes:
            raise TrainingFailedError(
                f"measuring the parts failed (exit code {codes[0]}); see the error above. Make sure that the memory "
                f"is enough for {workers} workers."
            )
        seconds: dict[str, float] = json.loads((Path(folder) / SECONDS).read_text(encoding="utf-8"))
    return seconds


def _measure(rank: int, config: EstimateConfig, folder: str) -> None:
    torch.set_num_threads(config.resources.threads)
    method, timeout = f"file://{folder}/{GROUP}", timedelta(minutes=10)
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=config.parallel.workers, timeout=timeout)
    seconds = measure_parts(config, hf_config_of_settings(config), CPU)
    if rank == 0:
        (Path(folder) / SECONDS).write_text(json.dumps(seconds), encoding="utf-8")
    dist.destroy_process_group()


def own_part_seconds(config: PretrainConfig, hf_config: Any) -> dict[str, float]:
    """As `part_seconds`, but only in this process and in CPU seconds, which other busy processes do not change."""
    alone = not dist.is_initialized()
    with _threads(config.resources.threads):
        if alone:
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
        try:
            return measure_parts(config, hf_config, CPU, _cpu_clock(config.resources.threads))
        finally:
            if alone:
                dist.destroy_process_group()


def lora_part_seconds(lora_model: LoraModel, pack: Any, threads: int) -> dict[str, float]:
    """Kind of part -> CPU seconds of a LoRA model's forward and backward passes over a pack."""
    own = LoraModel(**{field.name: getattr(lora_model, field.name) for field in fields(lora_model)})
    tokens, seconds = torch.from_numpy(pack), dict[str, float]()
    first = {part.kind: part for part in reversed(own.parts())}
    flow: Any = tokens
    with _threads(threads):
        for kind in dict.fromkeys(part.kind for part in own.parts()):
            layer = LoraPipelineLayer(first[kind], own, CPU)
            if kind == "head":
                flow = flow[0][:, layout_of(tokens).predicting], tokens

            def passes(layer: Any = layer, flow: Any = flow) -> Any:
                start = flow if isinstance(flow, Tensor) else (flow[0].detach().requires_grad_(), flow[1])
                out = layer(start)
                value = out if isinstance(out, Tensor) else out[0]
                if value.requires_grad:
                    value.backward(torch.ones_like(value))
                return out

            seconds[kind] = median(passes, CPU, _cpu_clock(threads))
            flow = passes()
    return seconds


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _cpu_clock(threads: int) -> Callable[[], float]:
    """CPU seconds of this process per thread."""
    return lambda: time.process_time() / threads
