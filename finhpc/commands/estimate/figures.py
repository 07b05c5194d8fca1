"""The figures that the estimates of a pretraining and of a finetuning have in common."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from finhpc.commands.estimate.run_time import beside_passes_s, measurable
from finhpc.errors import ConfigError
from finhpc.planning.costs import PretrainCosts
from finhpc.planning.devices import (
    CPU_REACHED,
    DEVICES,
    REACHED,
    THIS_MACHINE,
    Cluster,
    gpu_here,
    this_machine,
)
from finhpc.planning.finetuning import LoraCosts
from finhpc.planning.step_time import Pace
from finhpc.settings.base import nearest
from finhpc.settings.estimate import EstimateConfig, FinetuneEstimateConfig, Hardware
from finhpc.settings.training import TrainingConfig

Costs = PretrainCosts | LoraCosts


def check_device(hardware: Hardware) -> None:
    """Raise `ConfigError` for an unknown device."""
    names = [*DEVICES, THIS_MACHINE]
    if hardware.device not in names:
        raise ConfigError(
            f"estimate.device={hardware.device} is not known; {nearest(hardware.device, names)} For another device "
            "choose the most similar one and set what differs: --estimate.memory_gb, --estimate.tflops, "
            "--estimate.link_gb_per_s."
        )


def cluster_of(config: EstimateConfig | FinetuneEstimateConfig) -> Cluster:
    """The hardware of the `estimate` section; the rates of this machine are measured."""
    hardware, threads = config.estimate, config.resources.threads
    if hardware.device == THIS_MACHINE:
        per_node = hardware.devices_per_node or max(1, (os.cpu_count() or 1) // threads)
        device = this_machine(max(per_node, config.parallel.workers), threads)
    else:
        per_node = hardware.devices_per_node or 8
        device = DEVICES[hardware.device]
    stated: Mapping[str, Any] = {
        "memory_gb": hardware.memory_gb,
        "link_gb_per_s": hardware.link_gb_per_s,
        "network_gb_per_s": hardware.network_gb_per_s,
        "tflops": hardware.tflops and device.tflops | dict.fromkeys(device.tflops, hardware.tflops),
    }
    device = replace(device, **{key: value for key, value in stated.items() if value is not None})
    usable = hardware.usable * device.memory_gb * 1e9
    # The paper's 16 bits have the same rate as bfloat16.
    paper = isinstance(config, EstimateConfig) and config.estimate.scheme == "paper"
    precision = "bf16" if paper else config.train.products
    return Cluster(device, hardware.nodes, per_node, usable, hardware.reached, precision)


def estimate_result(
    costs: Costs, cluster: Cluster, pace: Pace, tokens: float, params: tuple[int, int, int]
) -> dict[str, Any]:
    """The result of an estimate with the figures that both kinds have; measured figures are null.

    `tokens`: per step; `params`: in total, trained, and of the dense model.
    """
    total, trained, dense = params
    return {
        "status": "dry_run",
        "params_total": total,
        "params_trainable": trained,
        "params_dense": dense,
        "compression_ratio": dense / total,
        "tokens_per_s": None,
        "peak_memory_bytes": None,
        "pipeline_utilization": None,
        "pipeline_utilization_ideal": costs.topology.utilization,
        "estimate": {
            "device": asdict(cluster.device) | {"usable_bytes": cluster.usable, "reached": cluster.reached},
            "stages": [asdict(stage) | {"fits": stage.peak_bytes <= cluster.usable} for stage in costs.stages()],
            **_timing(costs, pace, tokens),
        },
    }


def _timing(costs: Costs, pace: Pace, tokens: float) -> dict[str, Any]:
    """The figures of a step of so many tokens."""
    return {
        "operations_per_step": costs.operations_per_step(),
        "stage_s": pace.stage_s,
        "exchange_s": pace.exchange_s,
        "optimizer_s": pace.optimizer_s,
        "step_s": pace.step_s,
        "tokens_per_s": tokens / pace.step_s,
        "pipeline_bubble": 1 - costs.topology.utilization,
        "pipeline_utilization": pace.utilization,
    }


def dry_run_figures(
    costs: Costs,
    config: TrainingConfig,
    tokens: float,
    cuda: bool,
    here: bool,
    measure_parts: Callable[[], Mapping[str, float]] | None,
) -> tuple[dict[str, Any], Pace | None]:
    """The figures of a dry run, and its pace if that is known.

    `tokens`: per step. `here`: the run would be on this machine. The time is not known (null) elsewhere, and on a GPU
    without a data sheet in `DEVICES`. `measure_parts` returns seconds per micro-batch of each kind of part; it is
    called on a CPU if the parts are small enough.
    """
    numbers: dict[str, Any] = {
        "stages": [asdict(stage) for stage in costs.stages()],
        "operations_per_step": costs.operations_per_step(),
        "step_s": None,
        "tokens_per_s": None,
        "how": None,
        "reckoned_step_s": None,
        "run_s": None,
        "not_counted": [],
    }
    workers = costs.topology.workers
    device = None
    if here:
        device = gpu_here() if cuda else this_machine(workers, config.resources.threads)
    if device is None:
        return numbers, None
    reached = REACHED if cuda else CPU_REACHED
    cluster = Cluster(device, 1, workers, device.memory_gb * 1e9, reached, config.train.products)
    pace, how = costs.pace(cluster), device.describe_rate(config.train.products, reached)
    numbers["reckoned_step_s"] = pace.step_s
    if measure_parts and not cuda and measurable(pace, costs.kinds):
        costs = replace(costs, part_s=measure_parts())
        pace, how = costs.pace(cluster), "its parts measured on this machine"
    pace = replace(pace, exchange_s=pace.exchange_s + beside_passes_s(config))
    stages = [asdict(stage) for stage in costs.stages()]
    return numbers | {"stages": stages, **_timing(costs, pace, tokens), "how": how}, pace
