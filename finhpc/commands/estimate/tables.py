"""An estimate on the screen: tables of parameters, memory by stage, recomputation and topologies."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from finhpc.commands.estimate.run_time import said
from finhpc.models.families.family import described
from finhpc.planning.devices import THIS_MACHINE, Cluster
from finhpc.planning.outline import Outline
from finhpc.screen import rows_table, summary_table
from finhpc.settings.estimate import EstimateConfig

Rows = list[dict[str, Any]]
COLUMNS = {
    "weights": "weights_bytes",
    "gradients": "gradients_bytes",
    "optimiser": "optimizer_bytes",
    "intermediates": "intermediates_bytes",
    "exchange": "exchange_bytes",
    "peak": "peak_bytes",
}


def show(config: EstimateConfig, outline: Outline, cluster: Cluster, result: dict[str, Any]) -> None:
    """Everything that `finhpc estimate` found, on stderr."""
    wanted, numbers = config.estimate, result["estimate"]
    rows_table("parameters", _weight_rows(outline))
    what = "finhpc's engine" if wanted.scheme == "finhpc" else "the paper's mixed precision"
    rows_table(f"memory of a worker by stage in GB: {what}", stage_rows(numbers["stages"]))
    rows_table("the fullest stage by train.recompute", _mode_rows(numbers["recompute"]))
    rows = _topology_rows(numbers["topologies"][: wanted.show])
    rows_table(f"topologies on {cluster.nodes} x {cluster.devices_per_node} {cluster.device.name}", rows)
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
            **{name: gb(stage[key]) for name, key in COLUMNS.items()},
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
    source = f"{'parts measured: ' if device.name == THIS_MACHINE else ''}{cluster.reached:.0%} of the matrix rate"
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
    return rows + [("not counted", line) for line in numbers["not_counted"]]


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


def plan_summary(numbers: dict[str, Any], steps: int) -> list[tuple[str, str]]:
    """What a dry run's table says of the estimate for a run of `steps`."""
    rows = [("operations a step", f"{numbers['operations_per_step'] / 1e12:,.3g} TFLOP")]
    rows += [("not counted", line) for line in numbers["not_counted"]]
    if numbers["step_s"] is None:
        return [*rows, ("time", "for a GPU not known here: finhpc estimate --estimate.device NAME")]
    pace = f"{numbers['step_s']:,.2g} s, {numbers['tokens_per_s']:,.0f} tokens/s on idle cores: {numbers['how']}"
    return [
        *rows,
        ("a step", pace),
        (f"all {steps:,} steps", str(timedelta(seconds=round(steps * numbers["step_s"])))),
        ("the whole run", said(numbers)),
        ("pipeline bubble", f"{numbers['pipeline_bubble']:.1%} with even stages"),
    ]
