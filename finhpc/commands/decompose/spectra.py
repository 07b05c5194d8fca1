"""How a decomposition is reported: spectra on disk, a plot of them with the errors, and a table."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from finhpc.commands.decompose.layer_groups import Group, Report
from finhpc.screen import rows_table, summary_table

log = logging.getLogger(__name__)


def save_spectra(groups: list[Group], work: Path, path: Path) -> None:
    """Write all singular values of every layer, largest first, in float64: an .npz of name -> values.

    A layer that was factorized in blocks has a row for each.
    """
    values: dict[str, Any] = {}
    for group in groups:
        values |= load_file(group.spectra(work))
    with open(path, "wb") as file:
        np.savez(file, **values)


def draw(spectra: Path, reports: list[Report], path: Path) -> None:
    """Plot the singular values relative to the largest, and the error of each layer in the order of the model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    roles = sorted({_role(report["name"]) for report in reports})
    colors = {role: f"C{i % 10}" for i, role in enumerate(roles)}
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5), layout="constrained")
    labelled = set()
    with np.load(spectra, allow_pickle=False) as stored:
        for report in reports:
            role = _role(report["name"])
            for values in np.atleast_2d(stored[report["name"]]):
                shown = np.maximum(values / max(values[0], 1e-300), 1e-9)
                label = None if role in labelled else role
                labelled.add(role)
                left.semilogy(np.arange(1, len(shown) + 1) / len(shown), shown, color=colors[role], lw=0.7, label=label)
                left.plot(report["rank"] / len(shown), shown[report["rank"] - 1], ".", color=colors[role], ms=4)
    for role in roles:
        of_role = [report for report in reports if _role(report["name"]) == role]
        right.plot([report["error"] for report in of_role], "o-", color=colors[role], ms=3, lw=0.8, label=role)
    left.set(xlabel="index / number of singular values (dot: rank)", ylabel="singular value / largest")
    left.set_title("spectra" + (" of W S" if "output_error" in reports[0] else ""))
    right.set(xlabel="layer", ylabel="||W - BA|| / ||W||", title="error of each layer", ylim=(0, None))
    right.legend(fontsize=8)
    left.grid(alpha=0.3)
    right.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def summary(result: dict[str, Any]) -> None:
    """Print a table with a row per layer of a block, over all blocks, and what it all amounts to."""
    rows = []
    for role in dict.fromkeys(_role(report["name"]) for report in result["layers"]):
        reports = [report for report in result["layers"] if _role(report["name"]) == role]
        ratios = [report["error_over_optimal"] for report in reports if report["error_over_optimal"] is not None]
        rows.append(
            {
                "layer": role,
                "layers": len(reports),
                "shape": f"{reports[0]['out_features']} x {reports[0]['in_features']}",
                "rank": _range([report["rank"] for report in reports], "{}"),
                "error": _range([report["error"] for report in reports], "{:.3f}"),
                "over the optimum": _range(ratios, "{:.6f}"),
            }
        )
    rows_table("decompose", rows)
    if larger := [report["name"] for report in result["layers"] if _grows(report)]:
        log.info(f"{len(larger)} layers, such as {larger[0]}, are larger than dense; a lower rank would save memory")
    lines = [
        ("source", result["source"]),
        ("parameters", f"{result['params_total'] / 1e6:,.2f} M, dense {result['params_dense'] / 1e6:,.2f} M"),
        ("compression", f"{result['compression_ratio']:.2f} x; linear layers keep {result['linear_params_kept']:.1%}"),
        ("peak memory", f"{max(result['peak_memory_bytes']) / 1e6:,.0f} MB per process"),
        ("time", f"{result['wall_s']:.1f} s"),
        ("model", result["model"]),
        ("spectra", f"{result['model']}/spectra.png"),
    ]
    summary_table("decomposed model", lines)


def factor_params(report: Report) -> int:
    """Return the number of parameters of a layer's factors."""
    return int((report["out_features"] + report["blocks"] * report["in_features"]) * report["rank"])


def _grows(report: Report) -> bool:
    return factor_params(report) >= int(report["out_features"] * report["in_features"])


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
