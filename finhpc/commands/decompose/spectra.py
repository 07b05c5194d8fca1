"""What a decomposition leaves to look at: spectra on disk, their picture with the errors, the table."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from finhpc.commands.decompose.layer_groups import Group, Report


def save_spectra(groups: list[Group], work: Path, path: Path) -> None:
    """Write all singular values of every layer, largest first, in float64: an .npz of name -> values."""
    found: dict[str, Any] = {}
    for group in groups:
        found |= load_file(group.spectra(work))
    with open(path, "wb") as file:
        np.savez(file, **found)


def draw(spectra: Path, reports: list[Report], path: Path) -> None:
    """A picture: singular values over their largest, and the error of each layer by its place in the model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    roles = sorted({_role(report["name"]) for report in reports})
    colours = {role: f"C{i % 10}" for i, role in enumerate(roles)}
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5), layout="constrained")
    labelled = set()
    with np.load(spectra, allow_pickle=False) as held:
        for report in reports:
            values, role = held[report["name"]], _role(report["name"])
            shown = np.maximum(values / max(values[0], 1e-300), 1e-9)
            label = None if role in labelled else role
            labelled.add(role)
            left.semilogy(np.arange(1, len(shown) + 1) / len(shown), shown, color=colours[role], lw=0.7, label=label)
            left.plot(report["rank"] / len(shown), shown[report["rank"] - 1], ".", color=colours[role], ms=4)
    for role in roles:
        of_role = [report for report in reports if _role(report["name"]) == role]
        right.plot([report["error"] for report in of_role], "o-", color=colours[role], ms=3, lw=0.8, label=role)
    left.set(xlabel="index / number of singular values (dot: rank)", ylabel="singular value / largest")
    left.set_title("spectra" + (" of W S" if "output_error" in reports[0] else ""))
    right.set(xlabel="layer", ylabel="||W - BA|| / ||W||", title="error of each layer", ylim=(0, None))
    right.legend(fontsize=8)
    left.grid(alpha=0.3)
    right.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def summary(result: dict[str, Any]) -> None:
    """The table at the end: a line for the same layer of all blocks, and the whole."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"decomposed {result['source']}")
    for column in ("layer", "layers", "shape", "rank", "error", "over the optimum"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for role in dict.fromkeys(_role(report["name"]) for report in result["layers"]):
        reports = [report for report in result["layers"] if _role(report["name"]) == role]
        first = reports[0]
        table.add_row(
            role,
            str(len(reports)),
            f"{first['out_features']} x {first['in_features']}",
            _range([report["rank"] for report in reports], "{}"),
            _range([report["error"] for report in reports], "{:.3f}"),
            _range([r["error_over_optimal"] for r in reports if r["error_over_optimal"] is not None], "{:.6f}"),
        )
    console = Console(stderr=True)
    console.print(table)
    console.print(
        f"parameters {result['params_total'] / 1e6:,.2f} M, dense {result['params_dense'] / 1e6:,.2f} M "
        f"({result['compression_ratio']:.2f} x); linear layers keep {result['linear_params_kept']:.1%}; "
        f"{result['wall_s']:.1f} s; peak memory {max(result['peak_memory_bytes']) / 1e6:,.0f} MB a process"
    )
    larger = [report["name"] for report in result["layers"] if _grows(report)]
    if larger:
        console.print(f"{len(larger)} layers are larger than dense, as {larger[0]}; a lower rank would save memory")
    console.print(f"model: {shlex.quote(result['model'])} (spectra.png there)", soft_wrap=True, highlight=False)


def _grows(report: Report) -> bool:
    out, in_ = report["out_features"], report["in_features"]
    return bool((out + in_) * report["rank"] >= out * in_)


def _role(name: str) -> str:
    """A layer's name within its block."""
    parts = name.split(".")
    last = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[last + 1 :])


def _range(values: list[Any], form: str) -> str:
    if not values:
        return "-"
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"
