"""The estimate of a pretraining: by stage, by recomputation, and for every topology of a cluster."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from finhpc.commands.estimate.figures import check_device, cluster_of, dry_run_figures, estimate_result
from finhpc.commands.estimate.measure_parts import part_seconds
from finhpc.commands.estimate.run_time import Opened, this_machine_busy, training_time
from finhpc.commands.estimate.tables import show_pretraining
from finhpc.errors import ConfigError, collect
from finhpc.lowrank.registry import BLEND
from finhpc.models.pipeline import has_halves
from finhpc.models.schedule import most_workers
from finhpc.planning import paper
from finhpc.planning.costs import PretrainCosts, topologies
from finhpc.planning.devices import THIS_MACHINE
from finhpc.planning.memory import Memory, Scheme, Topology
from finhpc.planning.model import dense_config_of, hf_config_of_settings
from finhpc.planning.outline import Outline, outline_of
from finhpc.planning.plan import Plan, check_model
from finhpc.planning.step_time import blended_operations, step_operations
from finhpc.settings.estimate import EstimateConfig
from finhpc.settings.pretrain import PretrainConfig
from finhpc.settings.training import Recompute
from finhpc.training.optimizers.registry import check_optimizer

MODES: tuple[Recompute, ...] = ("none", "attention", "full")


def estimate_pretrain(config: EstimateConfig, dry_run: bool = False) -> dict[str, Any]:
    """Plan the pretraining of `config`, see `finhpc.commands.estimate.command.estimate`."""
    here = config.estimate.device == THIS_MACHINE
    if dry_run and here:
        raise ConfigError(
            f"estimate.device={THIS_MACHINE} runs the model's parts to measure them, which --dry_run does not; omit "
            "--dry_run (nothing is trained or written), or name a device, such as a100-80gb."
        )
    costs = pretraining_costs(config)
    cluster, topology, outline = cluster_of(config), costs.topology, costs.outline
    if here:
        costs = replace(costs, part_s=part_seconds(config, outline.hf_config))
        cluster = replace(cluster, reached=costs.reached(cluster.device.rate(cluster.precision)))
    pace, tokens = costs.pace(cluster), topology.samples_per_step * outline.seq_len
    params_dense = outline_of(dense_config_of(config), outline.seq_len).params
    result = estimate_result(costs, cluster, pace, tokens, (outline.params, outline.params, params_dense))
    samples = config.estimate.samples_per_step or topology.samples_per_step
    result["estimate"] |= {
        "scheme": config.estimate.scheme,
        "model_bytes": {str(bits): outline.stored_bytes(bits) for bits in (16, 8, 4)},
        "recompute": _by_recompute(costs, cluster.usable),
        "topologies": topologies(
            costs.memory,
            cluster,
            samples,
            sorted(set(config.estimate.micro_batch_sizes)),
            config.parallel.shard_optimizer,
        ),
        "not_counted": not_counted(config, outline, costs.memory.scheme),
        "differences": paper.differences("pretraining"),
    }
    show_pretraining(config, outline, cluster, result)
    return result


def pretraining_costs(config: EstimateConfig) -> PretrainCosts:
    """The costs of a pretraining without shards; raises `ConfigError` with every problem."""
    problems = config.problems()
    hf_config: Any = None
    with collect(problems):
        check_optimizer(config.optimizer)
    with collect(problems):
        check_device(config.estimate)
    with collect(problems):
        hf_config = hf_config_of_settings(config)
    if hf_config is not None:
        with collect(problems):
            check_model(config, hf_config)
    if problems:
        raise ConfigError(problems)
    scheme = Scheme.of(config, cuda=config.estimate.device != THIS_MACHINE)
    outline = outline_of(hf_config, config.data.seq_len, config.train.recompute)
    return PretrainCosts.of(outline, scheme, Topology.of(config))


def _by_recompute(costs: PretrainCosts, usable: float) -> dict[str, Any]:
    """Recompute mode -> its fullest stage, and its operations over those without recomputation."""
    hf_config, seq_len, fused = costs.outline.hf_config, costs.outline.seq_len, costs.outline.fused
    plain = step_operations(outline_of(hf_config, seq_len), 1)
    modes: dict[str, Any] = {}
    layers, topology = int(hf_config.num_hidden_layers), costs.topology
    for mode in MODES:
        if topology.stages > most_workers(topology.schedule, layers, has_halves(hf_config, mode)):
            continue
        outline = outline_of(hf_config, seq_len, mode, fused)
        fullest = PretrainCosts(Memory(outline, costs.memory.scheme), topology).fullest
        modes[mode] = {
            "intermediates_bytes": fullest.intermediates_bytes,
            "peak_bytes": fullest.peak_bytes,
            "operations_ratio": step_operations(outline, 1) / plain,
            "fits": fullest.peak_bytes <= usable,
        }
    return modes


def of_plan(plan: Plan, cuda: bool, here: bool, measures: bool = True) -> dict[str, Any]:
    """The figures of a dry run: memory by stage, and the time of a step and of the whole run (`run_s`, ...).

    See `dry_run_figures` for `here`; `measures`: whether the model's parts may be measured.
    """
    opened, config, topology = Opened.now(), plan.config, Topology.of(plan.config)
    costs = PretrainCosts.of(plan.outline, Scheme.of(config, cuda), topology)
    tokens = topology.samples_per_step * config.data.seq_len
    measure = partial(part_seconds, config, plan.hf_config) if measures else None
    numbers, pace = dry_run_figures(costs, config, tokens, cuda, here, measure)
    numbers["not_counted"] = not_counted(config, costs.outline, costs.memory.scheme)
    if pace is not None:
        batches = config.data.eval_samples // (topology.micro_batch_size * topology.replicas)
        final = min(config.data.final_samples, plan.shards.num_samples("val", config.data.seq_len))
        final_batches = final / topology.micro_batch_size
        run_time = training_time(config, pace, batches, cuda, opened, final_batches)
        numbers |= run_time.numbers(this_machine_busy(opened))
    return numbers


def not_counted(config: PretrainConfig, outline: Outline, scheme: Scheme) -> list[str]:
    """What the figures omit, one line each: the time of method 3's W; in the paper's scheme its memory too."""
    method, lines = config.method, []
    if method.kind == BLEND:
        operations = blended_operations(outline, method.blend_weight == "trainable")
        memory = "memory and time" if scheme.name == "paper" else "time"
        lines.append(
            f"{memory} of W ({method.blend_weight}), {outline.replaced:,} parameters until step "
            f"{method.blend_steps(config.train.steps)}: {operations:,.0f} operations per token"
        )
    name = config.optimizer.name
    if name == "loro":
        every = config.optimizer.restart_every
        lines.append(f"optimizer.name=loro: time of QR and SVD in an exact step, every {every} steps")
    if name != "adamw" and scheme.name == "paper":
        lines.append(f"optimizer.name={name}: the paper's scheme has AdamW's two moments of 4 bytes")
    return lines
