"""Seconds of a whole training step of several runs, measured in turn in one process, without Ray Train.

In turn, so that a busy machine slows all of them equally.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping
from functools import partial

from finhpc.cluster.tasks import run_tasks
from finhpc.settings.pretrain import PretrainConfig

WARM_UP = 3  # steps that are not counted


def step_times(configs: Mapping[str, PretrainConfig], steps: int, rounds: int) -> dict[str, list[float]]:
    """Name -> seconds per step, one figure per round of `steps` steps; every second round goes backwards.

    Measured on the CPU by a task of the connected Ray, with each run's micro-batches on one stage.
    """
    work = partial(_measure, steps=steps, rounds=rounds)
    ((_, seconds),) = run_tasks(work, [dict(configs)], lambda _: "measuring step times", 1)
    return seconds


def _measure(configs: dict[str, PretrainConfig], steps: int, rounds: int) -> dict[str, list[float]]:
    os.environ["DS_ACCELERATOR"] = "cpu"  # read when DeepSpeed is imported
    import torch

    from finhpc.data.shards.shards import Shards
    from finhpc.planning.plan import hf_config_of
    from finhpc.training.engine import Engine, process_group

    device = torch.device("cpu")
    with process_group("gloo"):
        engines: dict[str, tuple[Engine, float, list[torch.Tensor]]] = {}
        for name, config in configs.items():
            config = config.model_copy(deep=True)
            config.parallel.stages = config.parallel.replicas = 1
            torch.set_num_threads(config.resources.threads)
            shards, size = Shards.open(str(config.data.shards)), config.parallel.micro_batch_size
            held_out = torch.from_numpy(shards.eval_samples(size, config.data.seq_len))
            engine = Engine(config, hf_config_of(config, shards), device)
            engines[name] = engine, config.optimizer.lr / 10, [held_out] * config.parallel.micro_batches
            for _ in range(WARM_UP):
                engine.train_step(iter(engines[name][2]), engines[name][1])
        seconds: dict[str, list[float]] = {name: [] for name in configs}
        for round_ in range(rounds):
            for name in list(engines) if round_ % 2 == 0 else list(engines)[::-1]:
                engine, lr, batches = engines[name]
                took = []
                for _ in range(steps):
                    begin = time.perf_counter()
                    engine.train_step(iter(batches), lr)
                    took.append(time.perf_counter() - begin)
                seconds[name].append(statistics.median(took))
    return seconds
