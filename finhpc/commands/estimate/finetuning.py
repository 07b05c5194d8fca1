"""The estimate of a finetuning: by stage, by the bits of its base, and next to the paper's Table IX."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from finhpc.commands.estimate.figures import check_device, cluster_of, dry_run_figures, estimate_result
from finhpc.commands.estimate.measure_parts import lora_part_seconds
from finhpc.commands.estimate.run_time import FORWARD, Opened, this_machine_busy, training_time
from finhpc.commands.estimate.tables import show_finetuning
from finhpc.data.examples.batches import Batches
from finhpc.data.examples.examples import Examples
from finhpc.errors import ConfigError, collect
from finhpc.models.families.presets import PRESETS
from finhpc.models.families.registry import (
    FAMILIES,
    context_name,
    context_of,
    dense_original,
    parameter_count,
    resolve_shape,
)
from finhpc.models.files.source import locate, open_weights
from finhpc.models.files.weights import Weights
from finhpc.models.lora.model import LoraModel
from finhpc.models.packing.layout import Segments, segments_of
from finhpc.planning import paper
from finhpc.planning.devices import THIS_MACHINE, Cluster
from finhpc.planning.fake_packs import PackSize, Shapes
from finhpc.planning.finetuning import LoraCosts
from finhpc.planning.memory import Topology
from finhpc.planning.plan import check_stages
from finhpc.settings.base import nearest
from finhpc.settings.estimate import FinetuneEstimateConfig, PlannedBase
from finhpc.settings.finetune import FinetuneConfig
from finhpc.settings.pretrain import Model
from finhpc.training.optimizers.registry import check_optimizer, check_taken

BITS = (16, 8, 4)
STEPS_SAMPLED = 200  # steps whose packs a dry run makes


def estimate_finetune(config: FinetuneEstimateConfig) -> dict[str, Any]:
    """Plan the finetuning of `config`, see `estimate`; only the base's config is read."""
    costs, cluster = finetuning_costs(config), cluster_of(config)
    weights = costs.lora_model.weights
    total = sum(parameter.numel() for parameter in weights.skeleton.parameters()) + costs.trained
    tokens = costs.topology.samples_per_step * config.estimate.tokens
    params = total, costs.trained, parameter_count(dense_original(weights.config))
    result = estimate_result(costs, cluster, costs.pace(cluster), tokens, params)
    result["estimate"] |= {
        "by_bits": list(_by_bits(costs, cluster, tokens)),
        "table_ix": _next_to_table_ix(config.model.preset, costs),
        "differences": paper.differences("finetuning"),
    }
    show_finetuning(config, cluster, result)
    return result


def of_examples(
    config: FinetuneConfig,
    lora_model: LoraModel,
    examples: Examples,
    batches: Batches,
    cuda: bool,
    here: bool,
    measures: bool = True,
) -> dict[str, Any]:
    """The figures of a dry run: memory with the largest pack of the first steps, and time with the median one.

    See `dry_run_figures` for `here`; `measures`: whether the model's parts may be measured.
    """
    opened, per_step, topology = Opened.now(), config.parallel.samples_per_step, Topology.of(config)
    steps = min(config.train.steps, STEPS_SAMPLED, -(-len(examples.train) // per_step))
    packs = [batch["pack"] for step in range(steps) for batch in batches.step(examples.train, step, 0)]
    sizes = [pack.shape[2] for pack in packs]
    largest, middle = packs[int(np.argmax(sizes))], packs[int(np.argsort(sizes)[len(sizes) // 2])]
    costs = LoraCosts(lora_model, _size(middle), topology, cuda, optimizer=config.optimizer)
    tokens = per_step * float(np.diff(examples.train.offsets).mean())
    threads, workers = config.resources.threads, config.parallel.workers
    measure = partial(lora_part_seconds, lora_model, middle, threads, workers) if measures else None
    numbers, pace = dry_run_figures(costs, config, tokens, cuda, here, measure)
    numbers["stages"] = [asdict(stage) for stage in replace(costs, pack=_size(largest)).stages()]
    if pace is not None:
        scored = min(len(examples.held_out), config.data.eval_limit or len(examples.held_out))
        eval_batches = -(-scored // (topology.micro_batch_size * topology.replicas))
        time = training_time(config, pace, eval_batches, cuda, opened)
        labels = max((len(source.get("labels") or ()) for source in examples.counts["by_source"]), default=0)
        # The workers read the base as this process did, and so does the scoring of labels at the end.
        end_s = opened.cpu_s + scored * labels * FORWARD * pace.step_s / per_step if labels else 0.0
        time = replace(time, start_s=time.start_s + opened.cpu_s, end_s=time.end_s + end_s)
        numbers |= time.numbers(this_machine_busy(opened))
    return numbers


def pack_of(config: FinetuneEstimateConfig) -> PackSize:
    """The pack of a micro-batch of equal examples, whose last `answer` tokens are predicted.

    The last token of an example predicts nothing and is not computed.
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


def finetuning_costs(config: FinetuneEstimateConfig) -> LoraCosts:
    """The costs of a finetuning of equal examples; raises `ConfigError` with every problem.

    Of a base that is a preset, only the shapes are known.
    """
    problems = config.problems()
    weights = lora_model = None
    with collect(problems):
        check_device(config.estimate)
    with collect(problems):
        check_optimizer(config.optimizer)
    with collect(problems):
        weights = planned_base(config.model)
    if weights is not None:
        if (tokens := config.estimate.tokens) > context_of(weights.config):
            problems.append(
                f"estimate.tokens={tokens} is longer than the base's {context_name(weights.config)}; lower it."
            )
        with collect(problems):
            check_stages(config, weights.config)
        with collect(problems):
            lora_model = LoraModel.of(config, weights)
            check_taken(config.optimizer, lora_model.adapter_shapes)
    if problems:
        raise ConfigError(problems)
    assert lora_model is not None
    cuda = config.estimate.device != THIS_MACHINE
    return LoraCosts(lora_model, pack_of(config), Topology.of(config), cuda, optimizer=config.optimizer)


def planned_base(model: PlannedBase) -> Weights:
    """The base of which only the config is read; raises `ConfigError` unless one of path and preset is given."""
    path, preset = model.path, model.preset
    if (path is None) == (preset is None):
        raise ConfigError("give the base as one of model.path (a folder, hub id or .gguf) and model.preset (a shape).")
    if path is not None:
        return open_weights(locate(path), low_rank=True)
    if preset not in PRESETS:
        raise ConfigError(f"model.preset={preset} is not a known shape; {nearest(str(preset), list(PRESETS))}")
    shape = resolve_shape(Model(preset=preset))
    return Shapes(FAMILIES[shape.family].dense_config(shape))


def _with(costs: LoraCosts, bits: int, **lora: Any) -> LoraCosts:
    """The same finetuning with other bits and adapters."""
    old = costs.lora_model
    scheme = "minmax" if bits < 16 and old.quantization.scheme == "minmax" else "auto"
    quantization = old.quantization.model_copy(update={"bits": bits, "scheme": scheme})
    settings = old.lora.model_copy(update=lora | {"path": None})
    return replace(costs, lora_model=LoraModel(old.weights, settings, quantization, old.bf16, old.recompute, old.seed))


def _by_bits(costs: LoraCosts, cluster: Cluster, tokens: float) -> Iterator[dict[str, Any]]:
    """The fullest stage and the time of a step at 16, 8 and 4 bits."""
    for bits in BITS:
        try:
            other = costs if bits == costs.lora_model.quantization.bits else _with(costs, bits)
        except ConfigError:  # pissa and olora need 16 bits
            continue
        fullest, pace = max(other.stages(), key=lambda stage: stage.peak_bytes), other.pace(cluster)
        yield {
            "bits": bits,
            "scheme": other.lora_model.scheme,
            "base_bytes": other.weights_bytes,
            "peak_bytes": fullest.peak_bytes,
            "fits": fullest.peak_bytes <= cluster.usable,
            "step_s": pace.step_s,
            "tokens_per_s": tokens / pace.step_s,
        }


def _next_to_table_ix(preset: str | None, costs: LoraCosts) -> list[dict[str, Any]]:
    """The table's rows of the same model as printed, and the same adapters on one device with this workload."""
    rows = []
    one = replace(costs, topology=replace(costs.topology, stages=1, replicas=1))
    for row in paper.table_ix(preset):
        targets = paper.table_ix_targets(row["preset"])
        other = _with(one, row["bits"], rank=row["rank"], targets=targets, init="default")
        (stage,) = other.stages()
        rows.append(
            row
            | {
                "params_trainable": other.trained,
                "base_bytes": other.weights_bytes,
                "peak_bytes": stage.peak_bytes,
                "operations_per_step": other.operations_per_step(),
            }
        )
    return rows
