"""What a whole training step of several runs costs: seconds, measured in turn in one process, and operations.

In turn, so that a busy machine slows all of them equally.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from finhpc.cluster.connect import cluster_resources, use_cuda
from finhpc.cluster.tasks import run_tasks
from finhpc.commands.study.compare import Costs
from finhpc.lowrank.registry import BLEND
from finhpc.settings.pretrain import PretrainConfig

WARM_UP = 3  # steps that are not counted: the first ones compile


def step_costs(configs: Mapping[str, PretrainConfig], steps: int, rounds: int) -> Costs:
    """The seconds per step of each run, one figure per round of `steps` steps, and the operations of a step.

    Measured by a task of the connected Ray on a GPU, if the runs use one, or on the CPU; each run's micro-batches on
    one stage, compiled if the run itself is. Every second round goes backwards. Operations are those of the model's
    passes, without recomputation, and of the optimizer's matrix products.
    """
    resources = next(iter(configs.values())).resources
    cuda = use_cuda(resources, cluster_resources())
    work = partial(_measure, steps=steps, rounds=rounds, device_type="cuda" if cuda else "cpu")
    name = "measuring step times"
    ((_, costs),) = run_tasks(work, [dict(configs)], lambda _: name, 1, gpus=resources.gpus_per_worker if cuda else 0)
    return costs


def _measure(configs: dict[str, PretrainConfig], steps: int, rounds: int, device_type: str) -> Costs:
    os.environ["DS_ACCELERATOR"] = device_type  # read when DeepSpeed is imported
    import torch

    from finhpc.training.engine import process_group

    with process_group("nccl" if device_type == "cuda" else "gloo"):
        runs = {name: Run(config, torch.device(device_type)) for name, config in configs.items()}
        operations = {name: run.warm_up() for name, run in runs.items()}
        seconds: dict[str, list[float]] = {name: [] for name in configs}
        for round_ in range(rounds):
            for name in list(runs) if round_ % 2 == 0 else list(runs)[::-1]:
                seconds[name].append(statistics.median(runs[name].step() for _ in range(steps)))
    return Costs(seconds, operations)


class Run:
    """A run on one worker that takes its steps with the same held-out samples."""

    def __init__(self, config: PretrainConfig, device: Any) -> None:
        import torch

        from finhpc.data.shards.shards import Shards
        from finhpc.models.families.registry import skeleton
        from finhpc.planning.plan import hf_config_of
        from finhpc.training.compiler import run_operations
        from finhpc.training.engine import Engine

        torch.set_num_threads(config.resources.threads)
        self.config = config
        alone = config.model_copy(deep=True)
        alone.parallel.stages = alone.parallel.replicas = 1
        alone.parallel.schedule, alone.parallel.shard_optimizer = "1f1b", False
        alone.optimizer.dense_cycles = 0  # relora's pairs, which it trains most of the time
        shards, size = Shards.open(str(config.data.shards)), config.parallel.micro_batch_size
        self.hf_config = hf_config_of(config, shards)
        tokens = config.train.steps * config.parallel.samples_per_step * config.data.seq_len
        operations = run_operations(skeleton(self.hf_config), tokens) / config.parallel.workers
        self.engine = Engine(alone, self.hf_config, device, operations=operations)
        held_out = torch.from_numpy(shards.eval_samples(size, config.data.seq_len))
        self.batches = [held_out] * config.parallel.micro_batches

    def step(self) -> float:
        """Take a step at a low learning rate; return its seconds."""
        begin = time.perf_counter()
        self.engine.train_step(iter(self.batches), self.config.optimizer.lr / 10)
        return time.perf_counter() - begin

    def warm_up(self) -> float:
        """Take the steps that are not measured; return the operations of a step of all replicas."""
        from finhpc.planning.outline import outline_of
        from finhpc.planning.step_time import blended_operations, step_operations
        from finhpc.training.optimizers.stage import product_operations

        for _ in range(WARM_UP):
            self.step()
        config, outline = self.config, outline_of(self.hf_config, self.config.data.seq_len)
        shapes = {name: tuple(parameter.shape) for name, parameter in self.engine.trained_parameters().items()}
        parallel = config.parallel
        operations = step_operations(outline, parallel.samples_per_step, parallel.micro_batches * parallel.replicas)
        operations += product_operations([shapes], config.optimizer)
        if config.method.kind == BLEND:
            tokens = parallel.samples_per_step * config.data.seq_len
            operations += tokens * blended_operations(outline, config.method.blend_weight == "trainable")
        return operations
