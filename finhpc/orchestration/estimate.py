"""`finhpc estimate`: what a pretrain would need in memory, time and devices, before any is spent."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from finhpc.config import EstimateConfig, Method, Recompute, nearest
from finhpc.errors import ConfigError
from finhpc.models.family import described
from finhpc.orchestration.plan import check_model, check_parallel, collect
from finhpc.orchestration.progress import rows_table, summary_table
from finhpc.planning import paper
from finhpc.planning.devices import DEVICES, THIS_MACHINE, Device, this_machine
from finhpc.planning.memory import Memory, Scheme, StageMemory, Topology
from finhpc.planning.outline import Outline, outline_of
from finhpc.planning.pace import Pace, measured, paced, step_operations
from finhpc.planning.topology import Cluster, Option, options

MODES: tuple[Recompute, ...] = ("none", "attention", "full")
Rows = list[dict[str, Any]]


def estimate(config: EstimateConfig) -> dict[str, Any]:
    """Plan the run of `config` on the hardware of its `estimate` section; print tables, return the result.

    Nothing is trained or written. With `estimate.device this-machine` the parts are measured here, by as
    many processes as the run has workers. Raises `ConfigError` with every problem.
    """
    hf_config, dense = _checked(config)
    wanted, parallel = config.estimate, config.parallel
    outline = outline_of(hf_config, config.data.seq_len, config.train.recompute)
    topology = Topology(parallel.stages, parallel.replicas, parallel.micro_batch_size, parallel.micro_batches)
    here = wanted.device == THIS_MACHINE
    device = _device(config)
    scheme = Scheme(
        wanted.scheme, config.train.precision == "bf16", not here, wanted.weight_bits, wanted.zero_stage
    )
    memory = Memory(outline, scheme)
    cluster = Cluster(
        device,
        wanted.nodes,
        wanted.devices_per_node,
        wanted.usable * device.memory_gb * 1e9,
        wanted.reached,
        config.train.precision,
    )
    if here:
        from finhpc.orchestration.measuring import part_seconds

        seconds = part_seconds(config)
        cut = outline.stages(topology.stages, seconds)
        pace = measured(cut, topology, seconds)
    else:
        cut = outline.stages(topology.stages)
        pace = paced(outline, topology, cut, device, cluster.precision, cluster.reached, cluster.devices_per_node)
    stages = memory.stages(topology, cut)
    samples = wanted.samples_per_step or topology.samples_per_step
    found = options(memory, cluster, samples, sorted(set(wanted.micro_batch_sizes)))
    modes = _by_recompute(hf_config, memory, topology)
    result = _result(config, outline, dense, cluster, topology, stages, modes, pace, found)
    _show(config, outline, cluster, result)
    return result


def _checked(config: EstimateConfig) -> tuple[Any, Any]:
    """(transformers config of the model, the same dense), once nothing is wrong."""
    from finhpc.lowrank.replace import ranks_of
    from finhpc.models.families import make_config
    from finhpc.models.presets import resolve_shape

    problems: list[str] = []
    hf_config: Any = None
    with collect(problems):
        check_parallel(config)
    with collect(problems):
        _check_hardware(config)
    with collect(problems):
        hf_config = make_config(resolve_shape(config.model), ranks_of(config.method))
    if hf_config is not None:
        with collect(problems):
            check_model(config, hf_config)
        with collect(problems):
            outline_of(hf_config, config.data.seq_len)
    if problems:
        raise ConfigError(problems)
    return hf_config, make_config(resolve_shape(config.model), ranks_of(Method(kind="dense")))


def _check_hardware(config: EstimateConfig) -> None:
    wanted, problems = config.estimate, []
    names = [*DEVICES, THIS_MACHINE]
    if wanted.device not in names:
        problems.append(f"estimate.device={wanted.device} is not known; {nearest(wanted.device, names)}")
    if wanted.scheme == "finhpc" and wanted.zero_stage:
        problems.append(
            f"estimate.zero_stage={wanted.zero_stage} is not what finhpc trains with: every worker of a stage holds all "
            "of it; use 0, or estimate.scheme=paper."
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
    if problems:
        raise ConfigError(problems)


def _device(config: EstimateConfig) -> Device:
    wanted = config.estimate
    if wanted.device == THIS_MACHINE:
        device = this_machine(config.parallel.workers, config.resources.threads)
    else:
        device = DEVICES[wanted.device]
    stated = {
        "memory_gb": wanted.memory_gb,
        "link_gb_per_s": wanted.link_gb_per_s,
        "network_gb_per_s": wanted.network_gb_per_s,
        "tflops": wanted.tflops and device.tflops | {config.train.precision: wanted.tflops},
    }
    return replace(device, **{key: value for key, value in stated.items() if value is not None})


def _by_recompute(hf_config: Any, memory: Memory, topology: Topology) -> dict[str, tuple[StageMemory, float]]:
    """Mode -> (fullest stage, operations over those of no recomputation)."""
    found = {}
    plain = 0.0
    for mode in MODES:
        outline = outline_of(hf_config, memory.outline.seq_len, mode)
        fullest = max(Memory(outline, memory.scheme).stages(topology), key=lambda stage: stage.peak_bytes)
        operations = step_operations(outline, 1)
        plain = plain or operations
        found[mode] = (fullest, operations / plain)
    return found


def _result(
    config: EstimateConfig,
    outline: Outline,
    dense: Any,
    cluster: Cluster,
    topology: Topology,
    stages: list[StageMemory],
    modes: dict[str, tuple[StageMemory, float]],
    pace: Pace,
    found: list[Option],
) -> dict[str, Any]:
    params_dense = outline_of(dense, outline.seq_len).params
    return {
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
            "scheme": config.estimate.scheme,
            "model_bytes": {str(bits): _stored(outline, bits) for bits in (16, 8, 4)},
            "stages": [asdict(stage) | {"fits": stage.peak_bytes <= cluster.usable} for stage in stages],
            "recompute": {
                mode: {
                    "intermediates_bytes": stage.intermediates_bytes,
                    "peak_bytes": stage.peak_bytes,
                    "operations_ratio": ratio,
                    "fits": stage.peak_bytes <= cluster.usable,
                }
                for mode, (stage, ratio) in modes.items()
            },
            "operations_per_step": step_operations(outline, topology.samples_per_step),
            **timing(outline, topology, pace),
            "topologies": [_option(option) for option in found],
            "differences": [asdict(difference) for difference in paper.DIFFERENCES],
        },
    }


def timing(outline: Outline, topology: Topology, pace: Pace) -> dict[str, Any]:
    """What a `Pace` says, by name."""
    tokens = topology.samples_per_step * outline.seq_len
    return {
        "stage_s": pace.stage_s,
        "exchange_s": pace.exchange_s,
        "optimizer_s": pace.optimizer_s,
        "step_s": pace.step_s,
        "tokens_per_s": tokens / pace.step_s,
        "pipeline_bubble": 1 - topology.utilization,
        "pipeline_utilization": pace.utilization,
    }


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


def _stored(outline: Outline, bits: int) -> int:
    return sum(weights.count * weights.stored_bytes(bits) for weights in outline.weights)


# -- on the screen ----------------------------------------------------------------------------


def _show(config: EstimateConfig, outline: Outline, cluster: Cluster, result: dict[str, Any]) -> None:
    wanted, numbers = config.estimate, result["estimate"]
    rows_table("parameters", _weight_rows(outline))
    what = "finhpc's engine" if wanted.scheme == "finhpc" else "the paper's mixed precision"
    rows_table(f"memory of a worker by stage in GB: {what}", stage_rows(numbers["stages"]))
    rows_table("the fullest stage by train.recompute", _mode_rows(numbers["recompute"]))
    rows = _topology_rows(numbers["topologies"][: wanted.show])
    title = f"topologies on {wanted.nodes} x {wanted.devices_per_node} {wanted.device}"
    if rows:
        rows_table(title, rows)
    summary_table("estimate", _summary(config, cluster, result))
    if wanted.scheme == "paper":
        rows_table("where the paper's tables and the arithmetic disagree", numbers["differences"])


def _weight_rows(outline: Outline) -> Rows:
    return [
        {
            "module": weights.name,
            "paper": weights.paper_name or "",
            "size": ", ".join(f"{a} x {b}" for a, b in weights.matrices) or str(weights.vectors),
            "layers": weights.count,
            "M": f"{weights.total / 1e6:,.2f}",
            **{f"GB at {bits} bits": f"{weights.count * weights.stored_bytes(bits) / 1e9:.2f}" for bits in (16, 8, 4)},
            "%": f"{100 * weights.total / outline.params:.2f}",
        }
        for weights in outline.weights
    ]


def stage_rows(stages: Rows) -> Rows:
    """The table of memory by stage."""
    return [
        {
            "stage": stage["stage"],
            "parts": described(stage["parts"]),
            "parameters M": f"{stage['params'] / 1e6:,.2f}",
            **{
                name: gb(stage[f"{key}_bytes"])
                for name, key in (
                    ("weights", "weights"),
                    ("gradients", "gradients"),
                    ("optimiser", "optimizer"),
                    ("intermediates", "intermediates"),
                    ("exchange", "exchange"),
                    ("peak", "peak"),
                )
            },
            **({"fits": "yes" if stage["fits"] else "no"} if "fits" in stage else {}),
        }
        for stage in stages
    ]


def _mode_rows(modes: dict[str, dict[str, Any]]) -> Rows:
    return [
        {
            "recompute": mode,
            "intermediates GB": gb(numbers["intermediates_bytes"]),
            "peak GB": gb(numbers["peak_bytes"]),
            "operations": f"+{100 * (numbers['operations_ratio'] - 1):.1f} %",
            "fits": "yes" if numbers["fits"] else "no",
        }
        for mode, numbers in modes.items()
    ]


def _topology_rows(found: Rows) -> Rows:
    return [
        {
            "stages": option["stages"],
            "replicas": option["replicas"],
            "micro-batch": f"{option['micro_batch_size']} x {option['micro_batches']}",
            "fullest GB": gb(option["peak_bytes"]),
            "fits": "yes" if option["fits"] else "no",
            "bubble": f"{option['pipeline_bubble']:.0%}",
            "step s": f"{option['step_s']:,.3g}",
            "tokens/s": f"{option['tokens_per_s']:,.0f}",
        }
        for option in found
    ]


def _summary(config: EstimateConfig, cluster: Cluster, result: dict[str, Any]) -> list[tuple[str, str]]:
    numbers, device = result["estimate"], cluster.device
    source = "parts measured" if device.name == THIS_MACHINE else f"{cluster.reached:.0%} of the matrix rate"
    sizes = ", ".join(f"{gb(size)} GB at {bits} bits" for bits, size in numbers["model_bytes"].items())
    rows = [
        ("parameters", f"{result['params_total'] / 1e6:,.2f} M, dense {result['params_dense'] / 1e6:,.2f} M"),
        ("compression", f"{result['compression_ratio']:.2f} x"),
        ("model", sizes),
        (
            "device",
            f"{device.name}: {device.memory_gb:,.1f} GB ({cluster.usable / 1e9:,.1f} used at most), "
            f"{device.tflops[cluster.precision]:,.3g} TFLOP/s in {cluster.precision}",
        ),
        ("a step", f"{numbers['step_s']:,.3g} s, {numbers['operations_per_step'] / 1e12:,.3g} TFLOP ({source})"),
        ("tokens/s", f"{numbers['tokens_per_s']:,.0f} (estimated)"),
        (
            "pipeline bubble",
            f"{numbers['pipeline_bubble']:.1%} with even stages, {1 - numbers['pipeline_utilization']:.1%} as cut",
        ),
    ]
    if not any(option["fits"] for option in numbers["topologies"]):
        rows.append(("no topology fits", _remedy(config, numbers["topologies"], cluster)))
    return rows


def _remedy(config: EstimateConfig, found: Rows, cluster: Cluster) -> str:
    if not found:
        samples = config.estimate.samples_per_step or config.parallel.samples_per_step
        return f"{samples} samples a step are not shared out evenly by any; set estimate.samples_per_step."
    nearest_one = min(option["peak_bytes"] for option in found)
    return (
        f"the nearest needs {gb(nearest_one)} GB of {cluster.usable / 1e9:,.1f} a device; "
        "use more devices (more stages), train.recompute full, a lower rank, or a larger device."
    )


def gb(size: float) -> str:
    """Bytes as decimal GB: three digits or more."""
    return f"{size / 1e9:,.1f}" if size >= 100e9 else f"{size / 1e9:.3g}"
