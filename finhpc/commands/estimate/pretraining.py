"""`finhpc estimate`: what a pretrain would need in memory, time and devices, before any is spent."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from finhpc.commands.estimate.measure_parts import own_part_seconds, part_seconds
from finhpc.commands.estimate.run_time import Opened, measurable, this_machine_busy, training_time
from finhpc.commands.estimate.tables import show
from finhpc.errors import ConfigError, collect
from finhpc.lowrank.blend import blend_steps
from finhpc.lowrank.registry import BLEND
from finhpc.lowrank.replace import ranks_of
from finhpc.models.families.presets import resolve_shape
from finhpc.models.families.registry import dense_original, make_config, skeleton
from finhpc.models.files.config import read_config
from finhpc.planning import paper_memory as paper
from finhpc.planning.devices import CPU_REACHED, DEVICES, REACHED, THIS_MACHINE, Cluster, gpu_here, this_machine
from finhpc.planning.init import hf_config_of_settings
from finhpc.planning.memory import Memory, Scheme, StageMemory, Topology
from finhpc.planning.outline import Outline, outline_of
from finhpc.planning.plan import Plan, check_blend, check_model, check_parallel
from finhpc.planning.step_time import Pace, measured, paced, reached_by, step_operations
from finhpc.planning.topology import Option, options
from finhpc.settings.base import nearest
from finhpc.settings.estimate import EstimateConfig, Hardware
from finhpc.settings.finetune import TrainingConfig
from finhpc.settings.pretrain import Method, PretrainConfig
from finhpc.settings.training import Recompute
from finhpc.training.optimizer import OPTIMIZERS, check_optimizer

log = logging.getLogger(__name__)

ASSUMED = ("method.kind", "method.rank", "data.seq_len", "train.precision", "parallel.micro_batch_size")
MODES: tuple[Recompute, ...] = ("none", "attention", "full")


def estimate_pretrain(config: EstimateConfig, dry_run: bool = False) -> dict[str, Any]:
    """Plan the pretraining of `config` on the hardware of its `estimate` section; print tables, return the result.

    Nothing is trained or written. With `estimate.device this-machine` the parts of the model are measured here, by
    as many processes as the run has workers, which `dry_run` refuses. Raises `ConfigError` with every problem.
    """
    if dry_run and config.estimate.device == THIS_MACHINE:
        raise ConfigError(
            f"estimate.device={THIS_MACHINE} runs the model's parts to measure them, which --dry_run does not; leave "
            "--dry_run out (nothing is trained or written), or name a device, such as a100-80gb."
        )
    hf_config, params_dense = checked(config)
    wanted = config.estimate
    topology, cluster = topology_of(config), _cluster(config)
    here = wanted.device == THIS_MACHINE
    scheme = scheme_of(config, not here)
    fused = scheme.fused(config.data.seq_len)
    outline = outline_of(hf_config, config.data.seq_len, config.train.recompute, fused)
    memory = Memory(outline, scheme)
    if here:
        seconds = part_seconds(config)
        cut = outline.stages(topology.stages, seconds)
        pace = measured(outline, topology, cut, cluster, seconds)
        share = reached_by(outline, topology, seconds, cluster.device.rate(cluster.precision))
        cluster = replace(cluster, reached=share)
    else:
        cut = outline.stages(topology.stages)
        pace = paced(outline, topology, cut, cluster)
    found = options(memory, cluster, wanted.samples_per_step or topology.samples_per_step, _sizes(config))
    result: dict[str, Any] = {
        "status": "dry_run",
        "params_total": outline.params,
        "params_trainable": outline.params,
        "params_dense": params_dense,
        "compression_ratio": params_dense / outline.params,
        "tokens_per_s": None,
        "peak_memory_bytes": None,
        "pipeline_utilization": None,
        "pipeline_utilization_ideal": topology.utilization,
        "estimate": {
            "device": asdict(cluster.device) | {"usable_bytes": cluster.usable, "reached": cluster.reached},
            "scheme": wanted.scheme,
            "model_bytes": {str(bits): outline.stored_bytes(bits) for bits in (16, 8, 4)},
            "stages": stages_of(memory.stages(topology, cut), cluster.usable),
            "recompute": _by_recompute(hf_config, memory, topology, cluster.usable),
            **timing(outline, topology, pace),
            "topologies": [_option(option) for option in found],
            "not_counted": not_counted(config, outline, scheme),
            "differences": [asdict(difference) for difference in paper.DIFFERENCES],
        },
    }
    show(config, outline, cluster, result)
    if assumed := assumed_settings(config, ASSUMED):
        log.info(f"assumed, as no setting says it: {', '.join(assumed)}; set what your run has.")
    result["estimate"]["assumed"] = assumed
    return result


def assumed_settings(config: TrainingConfig, names: tuple[str, ...]) -> list[str]:
    """Those of the settings that memory and time depend on most and nobody gave, as KEY=VALUE."""
    found = []
    for name in names:
        section, _, key = name.partition(".")
        values = getattr(config, section)
        if key not in values.model_fields_set:
            found.append(f"{name}={getattr(values, key)}")
    return found


def of_plan(plan: Plan, cuda: bool, here: bool, measures: bool = True) -> dict[str, Any]:
    """Memory by stage, the time of a step and of the whole run (`run_s`, ...), as a dry run shows them.

    `here`: whether the run would be on this machine; else, and on a GPU without a data sheet here, its time
    is not known (null). `measures`: whether the model's parts are measured, on a CPU, where they are small enough.
    """
    opened = Opened.now()
    config, topology = plan.config, topology_of(plan.config)
    scheme = scheme_of(config, cuda)
    outline = replace(plan.outline, fused=scheme.fused(config.data.seq_len))
    memory = Memory(outline, scheme)
    cut, pace, reckoned, how = outline.stages(topology.stages), None, None, None
    device = None
    if here:
        device = gpu_here() if cuda else this_machine(topology.workers, config.resources.threads)
    if device is not None:
        reached = REACHED if cuda else CPU_REACHED
        workers = topology.workers
        cluster = Cluster(device, 1, workers, device.memory_gb * 1e9, reached, config.train.precision)
        pace = reckoned = paced(outline, topology, cut, cluster)
        how = device.said(config.train.precision, reached)
        if measures and not cuda and measurable(pace, outline.kinds):
            seconds = own_part_seconds(config, plan.hf_config)
            cut = outline.stages(topology.stages, seconds)
            pace, how = measured(outline, topology, cut, cluster, seconds), "its parts measured on this machine"
    numbers: dict[str, Any] = {
        "stages": stages_of(memory.stages(topology, cut)),
        "operations_per_step": step_operations(outline, topology.samples_per_step),
        "step_s": None,
        "tokens_per_s": None,
        "how": None,
        "reckoned_step_s": None if reckoned is None else reckoned.step_s,
        "run_s": None,
        "not_counted": not_counted(config, outline, scheme),
    }
    if pace is not None:
        numbers |= timing(outline, topology, pace) | {"how": how}
        batches = config.data.eval_samples // (topology.micro_batch_size * topology.replicas)
        numbers |= training_time(config, pace, batches, cuda, opened).numbers(this_machine_busy(opened))
    return numbers


def scheme_of(config: PretrainConfig, cuda: bool) -> Scheme:
    """How the run of `config` holds its numbers; the paper's scheme knows neither method 3's W nor 8-bit moments."""
    bf16, method = config.train.precision == "bf16", config.method
    if isinstance(config, EstimateConfig) and config.estimate.scheme == "paper":
        return Scheme("paper", bf16, cuda, config.estimate.weight_bits, config.estimate.zero_stage)
    blend = method.blend_weight if method.kind == BLEND else None
    return Scheme("finhpc", bf16, cuda, blend=blend, eight_bit_moments=config.optimizer.name == "adamw8bit")


def not_counted(config: PretrainConfig, outline: Outline, scheme: Scheme) -> list[str]:
    """What the figures leave out, a line each: the time of method 3's W; in the paper's scheme its memory too."""
    method, found = config.method, []
    if method.kind == BLEND:
        trained = method.blend_weight == "trainable"
        multiplied = sum(w.count * w.replaced for w in outline.weights if w.kind != "embedding")
        memory = "memory and time" if scheme.name == "paper" else "time"
        found.append(
            f"{memory} of W ({method.blend_weight}), {outline.replaced:,} parameters until step "
            f"{blend_steps(method, config.train.steps)}: {(6 if trained else 4) * multiplied:,} operations a token"
        )
    if origin := OPTIMIZERS.origin(config.optimizer.name):
        found.append(f"optimizer.name={config.optimizer.name} of {origin}: its moments are taken for AdamW's two")
    if config.optimizer.name == "adamw8bit" and scheme.name == "paper":
        found.append("optimizer.name=adamw8bit: the paper's scheme has moments of 4 bytes, and it takes about 1")
    return found


def topology_of(config: TrainingConfig) -> Topology:
    parallel = config.parallel
    return Topology(parallel.stages, parallel.replicas, parallel.micro_batch_size, parallel.micro_batches)


def stages_of(stages: list[StageMemory], usable: float | None = None) -> list[dict[str, Any]]:
    """The stages' memory by name, and whether it fits where `usable` bytes are known."""
    return [asdict(stage) | ({} if usable is None else {"fits": stage.peak_bytes <= usable}) for stage in stages]


def timing(outline: Outline, topology: Topology, pace: Pace) -> dict[str, Any]:
    """What a `Pace` says, by name."""
    tokens = topology.samples_per_step * outline.seq_len
    return {
        "operations_per_step": step_operations(outline, topology.samples_per_step),
        "stage_s": pace.stage_s,
        "exchange_s": pace.exchange_s,
        "optimizer_s": pace.optimizer_s,
        "step_s": pace.step_s,
        "tokens_per_s": tokens / pace.step_s,
        "pipeline_bubble": 1 - topology.utilization,
        "pipeline_utilization": pace.utilization,
    }


def checked(config: EstimateConfig) -> tuple[Any, int]:
    """(transformers config of the model, parameters of its dense twin), once nothing is wrong."""
    problems: list[str] = []
    hf_config: Any = None
    with collect(problems):
        check_parallel(config)
    with collect(problems):
        check_blend(config)
    with collect(problems):
        check_optimizer(config.optimizer)
    with collect(problems):
        _check_hardware(config)
    with collect(problems):
        hf_config = hf_config_of_settings(config)
    if hf_config is not None:
        with collect(problems):
            check_model(config, hf_config)
        with collect(problems):
            skeleton(hf_config)
    if problems:
        raise ConfigError(problems)
    if config.model.path is None:
        dense = make_config(resolve_shape(config.model), ranks_of(Method(kind="dense")))
    else:
        dense = dense_original(read_config(Path(config.model.path)))
    return hf_config, outline_of(dense, config.data.seq_len).params


def _check_hardware(config: EstimateConfig) -> None:
    wanted = config.estimate
    problems: list[str] = []
    with collect(problems):
        check_device(wanted)
    if wanted.scheme == "finhpc" and wanted.zero_stage:
        problems.append(
            f"estimate.zero_stage={wanted.zero_stage} is not what finhpc trains with: every worker of a stage holds "
            "all of it; use 0, or estimate.scheme=paper."
        )
    if wanted.scheme == "paper" and wanted.zero_stage > 1 and config.parallel.stages > 1:
        problems.append(
            f"estimate.zero_stage={wanted.zero_stage} with parallel.stages={config.parallel.stages}: gradients and "
            "weights are not shared out under a pipeline; use 0 or 1, or one stage."
        )
    if wanted.scheme == "finhpc" and wanted.weight_bits != 16:
        problems.append(
            f"estimate.weight_bits={wanted.weight_bits} is not what finhpc trains with: it holds float32 weights; "
            "use estimate.scheme=paper."
        )
    if any(size < 1 for size in wanted.micro_batch_sizes):
        problems.append(f"estimate.micro_batch_sizes={wanted.micro_batch_sizes} must all be 1 or more.")
    if problems:
        raise ConfigError(problems)


def _sizes(config: EstimateConfig) -> list[int]:
    return sorted(set(config.estimate.micro_batch_sizes))


def check_device(wanted: Hardware) -> None:
    """Raise `ConfigError` for a device that is not known."""
    names = [*DEVICES, THIS_MACHINE]
    if wanted.device not in names:
        raise ConfigError(
            f"estimate.device={wanted.device} is not known; {nearest(wanted.device, names)} For another one take the "
            "most similar, and state what differs: --estimate.memory_gb, --estimate.tflops, --estimate.link_gb_per_s."
        )


def _cluster(config: EstimateConfig) -> Cluster:
    # 16 bits, as the paper has it: the same rate
    precision = "bf16" if config.estimate.scheme == "paper" else config.train.precision
    return cluster_of(config.estimate, config.parallel.workers, config.resources.threads, precision)


def cluster_of(wanted: Hardware, workers: int, threads: int, precision: str) -> Cluster:
    """The hardware as planning takes it; this machine's rates are measured."""
    if wanted.device == THIS_MACHINE:
        per_node = wanted.devices_per_node or max(1, (os.cpu_count() or 1) // threads)
        device = this_machine(max(per_node, workers), threads)
    else:
        per_node = wanted.devices_per_node or 8
        device = DEVICES[wanted.device]
    stated: Mapping[str, Any] = {
        "memory_gb": wanted.memory_gb,
        "link_gb_per_s": wanted.link_gb_per_s,
        "network_gb_per_s": wanted.network_gb_per_s,
        "tflops": wanted.tflops and device.tflops | dict.fromkeys(device.tflops, wanted.tflops),
    }
    device = replace(device, **{key: value for key, value in stated.items() if value is not None})
    usable = wanted.usable * device.memory_gb * 1e9
    return Cluster(device, wanted.nodes, per_node, usable, wanted.reached, precision)


def _by_recompute(hf_config: Any, memory: Memory, topology: Topology, usable: float) -> dict[str, Any]:
    """Recompute mode -> its fullest stage, and its operations over those of no recomputation."""
    found: dict[str, Any] = {}
    plain = step_operations(outline_of(hf_config, memory.outline.seq_len), 1)
    for mode in MODES:
        outline = outline_of(hf_config, memory.outline.seq_len, mode, memory.outline.fused)
        fullest = max(Memory(outline, memory.scheme).stages(topology), key=lambda stage: stage.peak_bytes)
        found[mode] = {
            "intermediates_bytes": fullest.intermediates_bytes,
            "peak_bytes": fullest.peak_bytes,
            "operations_ratio": step_operations(outline, 1) / plain,
            "fits": fullest.peak_bytes <= usable,
        }
    return found


def _option(option: Option) -> dict[str, Any]:
    topology = option.topology
    return {
        **asdict(topology),
        "workers": topology.workers,
        "peak_bytes": option.fullest.peak_bytes,
        "fits": option.fits,
        "step_s": option.pace.step_s,
        "tokens_per_s": option.tokens_per_s,
        "pipeline_bubble": 1 - topology.utilization,
    }
