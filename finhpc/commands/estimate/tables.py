"""The tables of an estimate on stderr: parameters, memory by stage, and what other settings would change."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from finhpc.commands.estimate.run_time import describe_run_time
from finhpc.models.families.parts import describe_parts
from finhpc.planning.devices import THIS_MACHINE, Cluster
from finhpc.planning.outline import Outline
from finhpc.planning.plan import describe_compression
from finhpc.screen import duration, rows_table, summary_table
from finhpc.settings.estimate import EstimateConfig, FinetuneEstimateConfig

Rows = list[dict[str, Any]]
MEMORY_COLUMNS = ("weights", "gradients", "optimizer", "intermediates", "exchange", "peak")


def show_pretraining(config: EstimateConfig, outline: Outline, cluster: Cluster, result: dict[str, Any]) -> None:
    """All tables of a pretraining's estimate."""
    hardware, numbers = config.estimate, result["estimate"]
    unit, number = in_unit(numbers["model_bytes"].values())
    parameters = [
        {
            "module": weights.name,
            "paper": weights.paper_name or "",
            "size": ", ".join(f"{a} x {b}" for a, b in weights.matrices) or str(weights.vectors),
            "layers": weights.count,
            "M": f"{weights.total / 1e6:,.2f}",
            **{f"{unit} at {bits} bits": number(weights.count * weights.stored_bytes(bits)) for bits in (16, 8, 4)},
            "%": f"{100 * weights.total / outline.params:.2f}",
        }
        for weights in outline.weights
    ]
    rows_table("parameters", parameters)
    scheme = "finhpc's engine" if hardware.scheme == "finhpc" else "the paper's mixed precision"
    show_stages(numbers["stages"], f": {scheme}")
    unit, number = in_unit(row["peak_bytes"] for row in numbers["recompute"].values())
    modes = [
        {
            "recompute": mode,
            f"intermediates {unit}": number(row["intermediates_bytes"]),
            f"peak {unit}": number(row["peak_bytes"]),
            "operations": f"+{100 * (row['operations_ratio'] - 1):.1f} %",
            "fits": _yes(row["fits"]),
        }
        for mode, row in numbers["recompute"].items()
    ]
    rows_table("the fullest stage by train.recompute", modes)
    shown = numbers["topologies"][: hardware.show]
    unit, number = in_unit(row["peak_bytes"] for row in shown)
    topologies = [
        {
            "stages": row["stages"],
            "replicas": row["replicas"],
            "micro-batch": f"{row['micro_batch_size']} x {row['micro_batches']}",
            f"fullest {unit}": number(row["peak_bytes"]),
            "fits": _yes(row["fits"]),
            "bubble": f"{row['pipeline_bubble']:.0%}",
            **_speed(row),
        }
        for row in shown
    ]
    rows_table(f"topologies on {cluster.nodes} x {cluster.devices_per_node} {cluster.device.name}", topologies)
    summary_table("estimate", _pretraining_summary(config, cluster, result))
    if hardware.scheme == "paper":
        rows_table("where the paper's tables and the arithmetic disagree", numbers["differences"])


def _pretraining_summary(config: EstimateConfig, cluster: Cluster, result: dict[str, Any]) -> list[tuple[str, str]]:
    numbers, device = result["estimate"], cluster.device
    source = f"{'parts measured: ' if device.name == THIS_MACHINE else ''}{cluster.reached:.0%} of the matrix rate"
    rows = [
        ("parameters", f"{result['params_total'] / 1e6:,.2f} M, dense {result['params_dense'] / 1e6:,.2f} M"),
        ("compression", describe_compression(result["compression_ratio"])),
        ("model", ", ".join(f"{size(stored)} at {bits} bits" for bits, stored in numbers["model_bytes"].items())),
        (
            "device",
            f"{device.name}: {device.memory_gb:,.1f} GB (at most {cluster.usable / 1e9:,.1f} used), "
            f"{device.tflops[cluster.precision]:,.3g} TFLOP/s in {cluster.precision}",
        ),
        ("time per step", f"{numbers['step_s']:,.3g} s, {_tflop(numbers)} ({source})"),
        ("tokens/s", f"{numbers['tokens_per_s']:,.0f} (estimated)"),
        (
            "pipeline bubble",
            f"{numbers['pipeline_bubble']:.1%} with even stages, {1 - numbers['pipeline_utilization']:.1%} as cut",
        ),
    ]
    topologies = numbers["topologies"]
    if not topologies:
        samples = config.estimate.samples_per_step or config.parallel.samples_per_step
        remedy = f"no topology divides {samples} samples per step evenly; set estimate.samples_per_step."
        rows.append(("no topology fits", remedy))
    elif not any(row["fits"] for row in topologies):
        remedy = (
            f"the smallest needs {size(min(row['peak_bytes'] for row in topologies))} of {size(cluster.usable)} per "
            "device; use more devices (more stages), train.recompute full, a lower rank, or a larger device."
        )
        rows.append(("no topology fits", remedy))
    return rows + [("not counted", line) for line in numbers["not_counted"]]


def show_finetuning(config: FinetuneEstimateConfig, cluster: Cluster, result: dict[str, Any]) -> None:
    """All tables of a finetuning's estimate."""
    numbers, work, parallel = result["estimate"], config.estimate, config.parallel
    show_stages(numbers["stages"])
    unit, number = in_unit(row["peak_bytes"] for row in numbers["by_bits"])
    bits = [
        {
            "bits": row["bits"],
            "scheme": row["scheme"],
            f"base {unit}": number(row["base_bytes"]),
            f"peak {unit}": number(row["peak_bytes"]),
            "fits": _yes(row["fits"]),
            **_speed(row),
        }
        for row in numbers["by_bits"]
    ]
    rows_table("the fullest stage by quantization.bits", bits)
    _, number = in_unit(row["peak_bytes"] for row in numbers["table_ix"])  # of Llama 2, so GB
    table_ix = [
        {
            "rank": row["rank"],
            "bits": row["bits"],
            "trained M": f"{row['params_trainable'] / 1e6:.2f}",
            "(paper)": f"{row['trained_m']}",
            "base": number(row["base_bytes"]),
            "(paper) ": f"{row['model_gb']}",
            "peak": number(row["peak_bytes"]),
            "(paper)  ": f"{row['memory_gb']}",
            "beyond base": number(row["peak_bytes"] - row["base_bytes"]),
            "(paper)   ": f"{row['memory_gb'] - row['model_gb']:.1f}",
        }
        for row in numbers["table_ix"]
    ]
    rows_table("Table IX next to the same adapters here (GB)", table_ix)
    rows = [
        ("base", f"{(result['params_total'] - result['params_trainable']) / 1e6:,.2f} M parameters"),
        ("trained", f"{result['params_trainable'] / 1e6:,.2f} M"),
        ("time per step", f"{numbers['step_s']:,.3g} s, {_tflop(numbers)}, roughly: at {cluster.reached:.0%} of "
         f"{cluster.device.name}'s matrix rate"),
        ("examples", f"{parallel.samples_per_step} per step of {work.tokens} tokens, {work.answer} of them answers, "
         f"{work.shared} shared by {parallel.micro_batch_size}"),
        ("tokens/s", f"{numbers['tokens_per_s']:,.0f} (estimated)"),
        ("pipeline bubble", f"{numbers['pipeline_bubble']:.1%} with even stages"),
    ]  # fmt: skip
    summary_table("estimate of a finetuning", rows)
    if table_ix:
        rows_table("where the paper's table and the arithmetic disagree", numbers["differences"])


def show_stages(stages: Rows, of: str = "") -> None:
    """The table of memory by stage; `of` ends its title."""
    unit, number = in_unit(stage["peak_bytes"] for stage in stages)
    rows = [
        {
            "stage": stage["stage"],
            "parts": describe_parts(stage["parts"]),
            "parameters M": f"{stage['params'] / 1e6:,.2f}",
            **{name: number(stage[f"{name}_bytes"]) for name in MEMORY_COLUMNS},
            **({"fits": _yes(stage["fits"])} if "fits" in stage else {}),
        }
        for stage in stages
    ]
    rows_table(f"memory per worker by stage in {unit}, estimated{of}", rows)


def plan_summary(numbers: dict[str, Any], steps: int) -> list[tuple[str, str]]:
    """The rows of a dry run's table about a run of so many steps."""
    rows = [("operations per step", _tflop(numbers))]
    rows += [("not counted", line) for line in numbers["not_counted"]]
    if numbers["step_s"] is None:
        return [*rows, ("time", "for a GPU not known here: finhpc estimate --estimate.device NAME")]
    pace = f"{numbers['step_s']:,.2g} s, {numbers['tokens_per_s']:,.0f} tokens/s on idle cores: {numbers['how']}"
    return [
        *rows,
        ("time per step", pace),
        (f"all {steps:,} steps", duration(steps * numbers["step_s"])),
        ("the whole run", describe_run_time(numbers)),
        ("pipeline bubble", f"{numbers['pipeline_bubble']:.1%} with even stages"),
    ]


def in_unit(sizes: Iterable[float]) -> tuple[str, Callable[[float], str]]:
    """The unit of a table of sizes in bytes, and the function that formats them: MB if all are below 1 GB."""
    unit, scale = ("GB", 1e9) if max(sizes, default=0) >= 1e9 else ("MB", 1e6)
    return unit, lambda size: f"{size / scale:,.1f}" if size >= 100 * scale else f"{size / scale:.3g}"


def size(stored: float) -> str:
    """Bytes in MB or GB."""
    unit, number = in_unit([stored])
    return f"{number(stored)} {unit}"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _tflop(numbers: dict[str, Any]) -> str:
    return f"{numbers['operations_per_step'] / 1e12:,.3g} TFLOP"


def _speed(row: dict[str, Any]) -> dict[str, str]:
    return {"step s": f"{row['step_s']:,.3g}", "tokens/s": f"{row['tokens_per_s']:,.0f}"}
