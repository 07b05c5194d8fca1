"""`finhpc estimate finetune`: what a finetuning would need in memory and time, before any is spent."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from finhpc.commands.estimate.finetuning_tables import show
from finhpc.commands.estimate.measure_parts import adapted_part_seconds
from finhpc.commands.estimate.pretraining import assumed_settings, check_device, cluster_of, stages_of
from finhpc.commands.estimate.run_time import FORWARD, Opened, measurable, this_machine_busy, training_time
from finhpc.data.examples.batches import Batches
from finhpc.data.examples.examples import Examples
from finhpc.errors import ConfigError, collect
from finhpc.models.families.presets import PRESETS, resolve_shape
from finhpc.models.families.registry import FAMILIES, context_name, context_of, dense_original, parameter_count
from finhpc.models.files.weights import Weights, locate, open_weights
from finhpc.models.lora.frozen_base import Adaptation
from finhpc.models.packed.layout import Segments, segments_of
from finhpc.planning import table_ix
from finhpc.planning.devices import CPU_REACHED, REACHED, THIS_MACHINE, Cluster, gpu_here, this_machine
from finhpc.planning.fake_packs import PackSize, Shapes
from finhpc.planning.finetuning import FinetunePlan
from finhpc.planning.memory import Topology
from finhpc.planning.plan import check_parallel, check_stages
from finhpc.planning.step_time import Pace
from finhpc.settings.base import nearest
from finhpc.settings.estimate import FinetuneEstimateConfig
from finhpc.settings.finetune import FinetuneConfig
from finhpc.settings.pretrain import Model
from finhpc.training.optimizer import check_optimizer

log = logging.getLogger(__name__)

ASSUMED = ("lora.rank", "quantization.bits", "estimate.tokens", "train.precision", "parallel.micro_batch_size")
BITS = (16, 8, 4)
PACKS_LOOKED_AT = 200  # steps whose packs a dry run makes


def estimate_finetune(config: FinetuneEstimateConfig) -> dict[str, Any]:
    """Plan the finetuning of `config` on the hardware of its `estimate` section; print tables, return the result.

    Nothing is read but the base's config, nothing trained or written. Raises `ConfigError` with every problem.
    """
    weights, adaptation = checked(config)
    cluster, topology = _cluster(config), _topology(config)
    pack = pack_of(config)
    cuda = config.estimate.device != THIS_MACHINE
    plan = FinetunePlan(adaptation, pack, topology, cuda)
    base = sum(parameter.numel() for parameter in weights.skeleton.parameters())
    dense = parameter_count(dense_original(weights.config))
    tokens = topology.samples_per_step * config.estimate.tokens
    result: dict[str, Any] = {
        "status": "dry_run",
        "params_total": base + plan.trained,
        "params_trainable": plan.trained,
        "params_dense": dense,
        "compression_ratio": dense / (base + plan.trained),
        "tokens_per_s": None,
        "peak_memory_bytes": None,
        "pipeline_utilization": None,
        "pipeline_utilization_ideal": topology.utilization,
        "estimate": {
            "device": asdict(cluster.device) | {"usable_bytes": cluster.usable, "reached": cluster.reached},
            "stages": stages_of(plan.stages(), cluster.usable),
            "by_bits": list(_by_bits(plan, cluster, tokens)),
            **timing(plan, plan.pace(cluster), tokens),
            "table_ix": _beside_table_ix(config, plan),
            "differences": [asdict(difference) for difference in table_ix.DIFFERENCES],
        },
    }
    show(config, cluster, result)
    if assumed := assumed_settings(config, ASSUMED):
        log.info(f"assumed, as no setting says it: {', '.join(assumed)}; set what your run has.")
    result["estimate"]["assumed"] = assumed
    return result


def of_examples(
    config: FinetuneConfig,
    adaptation: Adaptation,
    examples: Examples,
    batches: Batches,
    cuda: bool,
    here: bool,
    measures: bool = True,
) -> dict[str, Any]:
    """Memory by stage and the time of a step, as a dry run of a finetuning shows them.

    Memory is that of the largest pack of the first steps, time that of the mean one. `here`: whether the run would be
    on this machine; else, and on a GPU without a data sheet here, its time is not known (null).
    """
    opened, per_step = Opened.now(), config.parallel.samples_per_step
    steps = min(config.train.steps, PACKS_LOOKED_AT, -(-len(examples.train) // per_step))
    packs = [made["pack"] for step in range(steps) for made in batches.step(examples.train, step, 0)]
    sizes = [pack.shape[2] for pack in packs]
    largest, middle = packs[int(np.argmax(sizes))], packs[int(np.argsort(sizes)[len(sizes) // 2])]
    topology = _topology(config)
    plan = FinetunePlan(adaptation, _size(largest), topology, cuda)
    numbers: dict[str, Any] = {
        "stages": stages_of(plan.stages()),
        "operations_per_step": None,
        "step_s": None,
        "tokens_per_s": None,
        "how": None,
        "reckoned_step_s": None,
        "run_s": None,
        "not_counted": [],
    }
    usual = replace(plan, pack=_size(middle))
    numbers["operations_per_step"] = usual.operations() * topology.micro_batches * topology.replicas
    device = None
    if here:
        device = gpu_here() if cuda else this_machine(topology.workers, config.resources.threads)
    if device is not None:
        reached = REACHED if cuda else CPU_REACHED
        cluster = Cluster(device, 1, topology.workers, device.memory_gb * 1e9, reached, config.train.precision)
        pace, numbers["how"] = usual.pace(cluster), device.said(config.train.precision, reached)
        numbers["reckoned_step_s"] = pace.step_s
        if measures and not cuda and measurable(pace, [part.kind for part in usual.parts]):
            seconds = adapted_part_seconds(adaptation, middle, config.resources.threads)
            stage_s = [sum(seconds[part.kind] for part in parts) for parts in usual.cut]
            pace, numbers["how"] = replace(pace, stage_s=stage_s), "its parts measured on this machine"
        lengths = np.diff(examples.train.offsets)
        numbers |= timing(usual, pace, per_step * float(lengths.mean()))
        scored = min(len(examples.held_out), config.data.eval_limit or len(examples.held_out))
        eval_batches = -(-scored // (topology.micro_batch_size * topology.replicas))
        time = training_time(config, pace, eval_batches, cuda, opened)
        labels = max((len(source.get("labels") or ()) for source in examples.counts["by_source"]), default=0)
        # The workers read the base as this process did, and so does the choice of labels at the end.
        end_s = opened.cpu_s + scored * labels * FORWARD * pace.step_s / per_step if labels else 0.0
        time = replace(time, start_s=time.start_s + opened.cpu_s, end_s=time.end_s + end_s)
        numbers |= time.numbers(this_machine_busy(opened))
    return numbers


def timing(plan: FinetunePlan, pace: Pace, tokens: float) -> dict[str, Any]:
    """Seconds and tokens a second of a step of so many tokens, each example's counted whole."""
    topology = plan.topology
    return {
        "operations_per_step": plan.operations() * topology.micro_batches * topology.replicas,
        "stage_s": pace.stage_s,
        "exchange_s": pace.exchange_s,
        "optimizer_s": pace.optimizer_s,
        "step_s": pace.step_s,
        "tokens_per_s": tokens / pace.step_s,
        "pipeline_bubble": 1 - topology.utilization,
        "pipeline_utilization": pace.utilization,
    }


def pack_of(config: FinetuneEstimateConfig) -> PackSize:
    """The pack of a micro-batch of equal examples, of which the last `answer` tokens are to be predicted.

    The last token of an example predicts nothing, and is not computed.
    """
    work, count = config.estimate, config.parallel.micro_batch_size
    own = work.tokens - 1 - work.shared
    spans = [(work.shared + i * own, work.shared + (i + 1) * own) for i in range(count)]
    targets = [end - i for _, end in spans for i in range(work.answer, 0, -1)]
    before = (0, work.shared) if work.shared else None
    groups: list[Any] = [(before, spans)] if before is None else [(None, [before]), (before, spans)]
    return PackSize(spans[-1][1], Segments(groups, targets, [1] * len(targets), 1.0))


def _size(pack: Any) -> PackSize:
    return PackSize(pack.shape[2], segments_of(torch.from_numpy(pack)[0]))


def _topology(config: FinetuneConfig) -> Topology:
    parallel = config.parallel
    return Topology(parallel.stages, parallel.replicas, parallel.micro_batch_size, parallel.micro_batches)


def _cluster(config: FinetuneEstimateConfig) -> Cluster:
    return cluster_of(config.estimate, config.parallel.workers, config.resources.threads, config.train.precision)


# -- checks -----------------------------------------------------------------------------------


def checked(config: FinetuneEstimateConfig) -> tuple[Weights, Adaptation]:
    """The base (its shape alone where a preset is named) and its adapters, once nothing is wrong."""
    problems: list[str] = []
    weights = adaptation = None
    with collect(problems):
        check_parallel(config)
    with collect(problems):
        check_device(config.estimate)
    with collect(problems):
        check_optimizer(config.optimizer)
    work = config.estimate
    if work.shared + work.answer >= work.tokens:
        problems.append(
            f"estimate.shared={work.shared} and estimate.answer={work.answer} leave nothing of estimate.tokens="
            f"{work.tokens}; the shared beginning, the rest of the prompt and the answer add up to it."
        )
    with collect(problems):
        weights = _base(config)
    if weights is not None:
        if work.tokens > context_of(weights.config):
            problems.append(
                f"estimate.tokens={work.tokens} is longer than the base's {context_name(weights.config)}; lower it."
            )
        with collect(problems):
            check_stages(config, weights.config)
        with collect(problems):
            adaptation = Adaptation.of(config, weights)
    if problems:
        raise ConfigError(problems)
    assert weights is not None
    assert adaptation is not None
    return weights, adaptation


def _base(config: FinetuneEstimateConfig) -> Weights:
    base = config.model
    if (base.path is None) == (base.preset is None):
        raise ConfigError("give the base as one of model.path (a folder, hub id or .gguf) and model.preset (a shape).")
    if base.path is not None:
        return open_weights(locate(base.path), low_rank=True)
    if base.preset not in PRESETS:
        raise ConfigError(f"model.preset={base.preset} is no shape; {nearest(str(base.preset), list(PRESETS))}")
    shape = resolve_shape(Model(preset=base.preset))
    return Shapes(FAMILIES[shape.family].dense_config(shape))


# -- beside others -----------------------------------------------------------------------------------


def _with(config: FinetuneConfig, plan: FinetunePlan, bits: int, **lora: Any) -> FinetunePlan:
    """The same finetuning with other bits and adapters."""
    old = plan.adaptation
    scheme = config.quantization.scheme if config.quantization.scheme == "minmax" else "auto"
    quantization = config.quantization.model_copy(update={"bits": bits, "scheme": scheme if bits < 16 else "auto"})
    settings = old.lora.model_copy(update=lora)
    adaptation = Adaptation(old.weights, settings, quantization, old.bf16, old.recompute, old.seed)
    return FinetunePlan(adaptation, plan.pack, plan.topology, plan.cuda, plan.layouts)


def _by_bits(plan: FinetunePlan, cluster: Cluster, tokens: float) -> Iterator[dict[str, Any]]:
    """The fullest stage and the time of a step at 16, 8 and 4 bits."""
    old = plan.adaptation
    for bits in BITS:
        settings = FinetuneConfig(lora=old.lora, quantization=old.quantization)
        try:
            other = _with(settings, plan, bits)
        except ConfigError:  # pissa and olora go with 16 bits alone
            continue
        fullest = max(other.stages(), key=lambda stage: stage.peak_bytes)
        pace = other.pace(cluster)
        yield {
            "bits": bits,
            "scheme": other.adaptation.scheme,
            "base_bytes": other.weights_bytes,
            "peak_bytes": fullest.peak_bytes,
            "fits": fullest.peak_bytes <= cluster.usable,
            "step_s": pace.step_s,
            "tokens_per_s": tokens / pace.step_s,
        }


def _beside_table_ix(config: FinetuneEstimateConfig, plan: FinetunePlan) -> list[dict[str, Any]]:
    """The table's rows of the same model: what it prints, and the same adapters on one device with this workload."""
    found = []
    one = replace(plan, topology=replace(plan.topology, stages=1, replicas=1))
    for row in table_ix.ROWS:
        if row.preset == config.model.preset:
            other = _with(config, one, row.bits, rank=row.rank, targets=table_ix.TARGETS[row.preset], init="default")
            (stage,) = other.stages()
            found.append(
                asdict(row)
                | {
                    "params_trainable": other.trained,
                    "base_bytes": other.weights_bytes,
                    "peak_bytes": stage.peak_bytes,
                    "operations_per_step": other.operations() * other.topology.micro_batches,
                }
            )
    return found
