"""Seconds of a whole training step of several runs, measured in turn in one process without Ray.

In turn, so that a busy machine slows all of them equally.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finhpc.errors import TrainingFailedError
from finhpc.settings.pretrain import PretrainConfig

WARM_UP = 3  # steps that are not counted


def step_times(configs: Mapping[str, PretrainConfig], steps: int, rounds: int) -> dict[str, list[float]]:
    """Name -> seconds per step, one figure per round of `steps` steps; every second round goes backwards.

    Measured on the CPU, with each run's micro-batches on one stage. Raises `TrainingFailedError` if the measuring
    process dies.
    """
    with tempfile.TemporaryDirectory() as folder:
        trees = {name: config.model_dump(mode="json") for name, config in configs.items()}
        process: Any = multiprocessing.get_context("spawn").Process(
            target=_measure, args=(trees, steps, rounds, folder)
        )
        process.start()
        try:
            process.join()
        finally:
            process.kill()
        if process.exitcode:
            raise TrainingFailedError(
                f"measuring step times failed (exit code {process.exitcode}); its error stands above. "
                "The same command measures again."
            )
        seconds: dict[str, list[float]] = json.loads((Path(folder) / "seconds.json").read_text(encoding="utf-8"))
    return seconds


def _measure(trees: dict[str, dict[str, Any]], steps: int, rounds: int, folder: str) -> None:
    import os
    import statistics
    import time

    import torch
    import torch.distributed as dist

    from finhpc.data.shards.shards import Shards
    from finhpc.planning.plan import hf_config_of
    from finhpc.training.engine import Engine

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": "cpu"}  # DeepSpeed reads them
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)
    engines: dict[str, tuple[Engine, float, list[torch.Tensor]]] = {}
    for name, tree in trees.items():
        config = PretrainConfig.model_validate(tree)
        config.parallel.stages = config.parallel.replicas = 1
        torch.set_num_threads(config.resources.threads)
        shards, size = Shards.open(str(config.data.shards)), config.parallel.micro_batch_size
        held_out = torch.from_numpy(shards.eval_samples(size, config.data.seq_len))
        engine = Engine(config, hf_config_of(config, shards), torch.device("cpu"))
        engines[name] = engine, config.optimizer.lr / 10, [held_out] * config.parallel.micro_batches
        for _ in range(WARM_UP):
            engine.train_step(iter(engines[name][2]), engines[name][1])
    seconds: dict[str, list[float]] = {name: [] for name in trees}
    for round_ in range(rounds):
        for name in list(engines) if round_ % 2 == 0 else list(engines)[::-1]:
            engine, lr, batches = engines[name]
            took = []
            for _ in range(steps):
                began = time.perf_counter()
                engine.train_step(iter(batches), lr)
                took.append(time.perf_counter() - began)
            seconds[name].append(statistics.median(took))
    (Path(folder) / "seconds.json").write_text(json.dumps(seconds), encoding="utf-8")
    dist.destroy_process_group()
