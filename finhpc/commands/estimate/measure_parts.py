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
from typing import TYPE_CHECKING, Any

from finhpc.errors import TrainingFailedError
from finhpc.settings.pretrain import PretrainConfig

if TYPE_CHECKING:
    from finhpc.models.lora.model import LoraModel

GROUP = "group"  # the file through which the processes find each other
SECONDS = "seconds.json"


def part_seconds(config: PretrainConfig) -> dict[str, float]:
    """Kind of part -> seconds per micro-batch, forward and backward with its share of the optimizer's step.

    Takes seconds to a minute. Raises `TrainingFailedError` if a process dies.
    """
    workers = config.parallel.workers
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        arguments = (config.model_dump(mode="json"), workers, folder)
        processes: list[Any] = [context.Process(target=_measure, args=(i, *arguments)) for i in range(workers)]
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


def own_part_seconds(config: PretrainConfig, hf_config: Any) -> dict[str, float]:
    """As `part_seconds`, but only in this process and in CPU seconds, which other busy processes do not change."""
    import torch
    import torch.distributed as dist

    from finhpc.models.pipeline import parts_of
    from finhpc.training.stages import measure

    alone = not dist.is_initialized()
    with _threads(config.resources.threads):
        if alone:
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
        try:
            costs = measure(config, hf_config, torch.device("cpu"), _clock(config.resources.threads))
        finally:
            if alone:
                dist.destroy_process_group()
    kinds = [part.kind for part in parts_of(hf_config, config.train.recompute)]
    return dict(zip(kinds, costs, strict=True))


def lora_part_seconds(lora_model: LoraModel, pack: Any, threads: int) -> dict[str, float]:
    """Kind of part -> CPU seconds of a LoRA model's forward and backward passes over a pack."""
    import torch
    from torch import Tensor

    from finhpc.models.lora.model import LoraModel, LoraPipelineLayer
    from finhpc.models.packing.layout import layout_of
    from finhpc.training.stages import median

    own = LoraModel(**{field.name: getattr(lora_model, field.name) for field in fields(lora_model)})
    tokens, seconds = torch.from_numpy(pack), dict[str, float]()
    first = {part.kind: part for part in reversed(own.parts())}
    order = list(dict.fromkeys(part.kind for part in own.parts()))
    flow: Any = tokens
    with _threads(threads):
        for kind in order:
            layer = LoraPipelineLayer(first[kind], own, torch.device("cpu"))
            if kind == "head":
                flow = flow[0][:, layout_of(tokens).predicting], tokens

            def passes(layer: Any = layer, flow: Any = flow) -> Any:
                start = flow if isinstance(flow, Tensor) else (flow[0].detach().requires_grad_(), flow[1])
                out = layer(start)
                value = out if isinstance(out, Tensor) else out[0]
                if value.requires_grad:
                    value.backward(torch.ones_like(value))
                return out

            seconds[kind] = median(passes, torch.device("cpu"), _clock(threads))
            flow = passes()
    return seconds


@contextmanager
def _threads(number: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _clock(threads: int) -> Callable[[], float]:
    """CPU seconds of this process per thread."""
    return lambda: time.process_time() / threads


def _measure(rank: int, settings: dict[str, Any], workers: int, folder: str) -> None:
    import torch
    import torch.distributed as dist

    from finhpc.models.pipeline import parts_of
    from finhpc.planning.init import hf_config_of_settings
    from finhpc.settings.estimate import EstimateConfig
    from finhpc.training.stages import measure

    config = EstimateConfig.model_validate(settings)
    torch.set_num_threads(config.resources.threads)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/{GROUP}",
        rank=rank,
        world_size=workers,
        timeout=timedelta(minutes=10),
    )
    hf_config = hf_config_of_settings(config)
    costs = measure(config, hf_config, torch.device("cpu"))
    if rank == 0:
        kinds = [part.kind for part in parts_of(hf_config, config.train.recompute)]
        (Path(folder) / SECONDS).write_text(json.dumps(dict(zip(kinds, costs, strict=True))), encoding="utf-8")
    dist.destroy_process_group()
