"""Seconds of each kind of part on this machine, from CPU seconds, which other busy processes do not change."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from finhpc.models.lora.model import LoraModel, LoraPipelineLayer
from finhpc.models.packing.layout import layout_of
from finhpc.settings.pretrain import PretrainConfig
from finhpc.training.stages import measure_parts, median

CPU = torch.device("cpu")
# Cores that Ray's own processes take while a run trains: fourteen of them on two cores took 0.10 to 0.12.
RAY_CORES = 0.1


def part_seconds(config: PretrainConfig, hf_config: Any) -> dict[str, float]:
    """Kind of part -> seconds per micro-batch, forward and backward with its share of the optimizer's step."""
    alone = not dist.is_initialized()
    with _threads(config.resources.threads, config.parallel.workers) as clock:
        if alone:
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
        try:
            return measure_parts(config, hf_config, CPU, clock)
        finally:
            if alone:
                dist.destroy_process_group()


def lora_part_seconds(lora_model: LoraModel, pack: Any, threads: int, workers: int) -> dict[str, float]:
    """Kind of part -> seconds of a LoRA model's forward and backward passes over a pack, on one of so many workers."""
    own = LoraModel(**{field.name: getattr(lora_model, field.name) for field in fields(lora_model)})
    tokens, seconds = torch.from_numpy(pack), dict[str, float]()
    first = {part.kind: part for part in reversed(own.parts())}
    flow: Any = tokens
    with _threads(threads, workers) as clock:
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

            seconds[kind] = median(passes, CPU, clock)
            flow = passes()
    return seconds


@contextmanager
def _threads(number: int, workers: int) -> Iterator[Callable[[], float]]:
    """Compute with so many threads; yields a clock of the CPU seconds per thread.

    If the workers' threads take all cores, the clock has the time for which they will wait for Ray's processes.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    share = 1 - RAY_CORES if number * workers >= (os.cpu_count() or 1) else 1.0
    try:
        yield lambda: time.process_time() / number / share
    finally:
        torch.set_num_threads(before)
