"""Seconds of each kind of part on this machine, measured by as many processes at once as will train."""

from __future__ import annotations

import json
import multiprocessing
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

from finhpc.config import PretrainConfig
from finhpc.errors import TrainingFailedError

GROUP = "group"  # file by which the processes find each other
ANSWER = "seconds.json"


def part_seconds(config: PretrainConfig) -> dict[str, float]:
    """Kind of part -> seconds a micro-batch, forward and backward with its share of the optimiser.

    Takes seconds to a minute. Raises `TrainingFailedError` where a process dies.
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
                f"measuring the parts failed (exit code {codes[0]}); its error stands above. "
                "Was there room for so many workers?"
            )
        seconds: dict[str, float] = json.loads((Path(folder) / ANSWER).read_text(encoding="utf-8"))
    return seconds


def _measure(rank: int, settings: dict[str, Any], workers: int, folder: str) -> None:
    import torch
    import torch.distributed as dist

    from finhpc.config import EstimateConfig
    from finhpc.models.pipeline import parts_of
    from finhpc.orchestration.start import model_config
    from finhpc.training.cost import measure

    config = EstimateConfig.model_validate(settings)
    torch.set_num_threads(config.resources.threads)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/{GROUP}",
        rank=rank,
        world_size=workers,
        timeout=timedelta(minutes=10),
    )
    hf_config = model_config(config)
    costs = measure(config, hf_config, torch.device("cpu"))
    if rank == 0:
        kinds = [part.kind for part in parts_of(hf_config, config.train.recompute)]
        (Path(folder) / ANSWER).write_text(json.dumps(dict(zip(kinds, costs, strict=True))), encoding="utf-8")
    dist.destroy_process_group()
