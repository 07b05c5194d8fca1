"""Figures 6 and 7 and the scatter plots, drawn as PNG for paper and as SVG in the page's colors."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finhpc.commands.report.curves import Curve, Panel, drawn, mean_curve
from finhpc.commands.report.runs import FINANCIAL, Collected, Scale
from finhpc.commands.report.tables import Row, Table
from finhpc.tracking.tags import SCORED_FROM

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS = 2  # as in the paper; for the scales with most rows
POINTS = 400  # drawn per training loss, each the mean of the steps around it
BYTES_16BIT = 2
COLORS = {  # readable on white and on black
    "dense": "#8a8f98",
    "low_rank": "#3b82c4",
    "svd": "#e0812f",
    "blend": "#3fa45b",
    "cola": "#a06cc9",
    "half": "#c2577b",
    "sltrain": "#2f9fa8",
    "guided": "#9a8a3c",
    "base": "#8a8f98",
}
BITS_COLORS = {16: "#3b82c4", 8: "#e0812f", 4: "#3fa45b"}
METHOD_NAMES = {
    "dense": "dense",
    "low_rank": "method 1",
    "svd": "method 2",
    "blend": "method 3 (not in the paper)",
    "cola": "CoLA (not in the paper)",
    "half": "half-linear latent (not in the paper)",
    "sltrain": "SLTrain (not in the paper)",
    "guided": "self-guided (not in the paper)",
}
STYLES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (1.2, 1.4)), (0, (6, 1.5, 1.2, 1.5)))  # by rank, largest first
MARKERS = {16: "o", 8: "s", 4: "^"}
INK, PAPER_INK = "#123457", "#1f2328"  # the first is replaced by the page's text color


@dataclass(frozen=True)
class Figure:
    """A drawn figure; its `svg` has the color of the text around it."""

    key: str
    title: str
    caption: str
    panels: int
    svg: str
    png: bytes


def make_figures(found: Collected, tables: dict[str, Table]) -> list[Figure]:
    """All figures that have something to show."""
    figures = [
        make_figure(
            "figure-6",
            "Figure 6: training loss for pretraining, methods 1 and 2",
            "Training loss against steps; each point is the mean over the seeds and the steps since the last point.",
            [_loss_panel(found, scale, rows) for scale, rows in _pretrained_rows(tables)[:PANELS]],
        ),
        make_figure(
            "figure-7",
            "Figure 7: training loss for finetuning",
            "Training loss of adapters over one frozen base, by rank and by the base's bits.",
            [
                _loss_panel(found, group.scale, [row for row in group.rows if row.kind == "lora"], tuned=True)
                for group in tables["viii"].groups[:PANELS]
            ],
        ),
        make_figure(
            "quality-size",
            "Quality against size",
            "Hollow: 16 bits counted as 2 bytes per parameter, because no size was logged. Circles: 16 bits; squares: "
            "8; triangles: 4.",
            _scatter(found, tables, "size"),
        ),
        make_figure(
            "quality-time",
            "Quality against time",
            "Workers x the running time of the command; for methods 2 and 3 including that of the dense model they "
            "start from, or hollow if MLflow does not have it.",
            _scatter(found, tables, "time"),
        ),
    ]
    return [figure for figure in figures if figure is not None]


# -- loss curves ----------------------------------------------------------------------------


def _pretrained_rows(tables: dict[str, Table]) -> list[tuple[Scale, list[Row]]]:
    """Scale -> the rows of Tables VI and VII, the scales with most rows first."""
    scales: dict[Scale, dict[str, Row]] = {}
    for key in ("vi", "vii"):
        for group in tables[key].groups:
            rows = scales.setdefault(group.scale, {})
            for row in group.rows:
                rows.setdefault(f"{row.kind} {row.label}", row)
    ordered = sorted(scales.items(), key=lambda item: (-len(item[1]), -item[0].amount))
    return [(scale, list(rows.values())) for scale, rows in ordered]


def _loss_panel(found: Collected, scale: Scale, rows: Sequence[Row], tuned: bool = False) -> Panel | None:
    curves = [(row, smoothed(mean_curve(found.curves(row.runs, "train_loss")))) for row in rows if row.runs]
    curves = [(row, curve) for row, curve in curves if len(curve) > 1]
    if not curves:
        return None

    def draw(axes: Axes, ink: str) -> None:
        ranks = sorted({row.rank for row, _ in curves if row.rank}, reverse=True)
        for row, curve in curves:
            style = STYLES[ranks.index(row.rank) % len(STYLES)] if row.rank else "-"
            color = BITS_COLORS.get(row.bits or 16) if tuned else COLORS.get(row.kind)
            rank, bits = (f"r = {row.rank}" if row.rank else ""), (f"{row.bits} bits" if row.bits else "")
            name = "" if tuned else METHOD_NAMES.get(row.kind, row.kind)
            label = ", ".join(part for part in (name, rank, bits) if part)
            axes.plot(list(curve), list(curve.values()), color=color, ls=style, lw=1.6, label=label)
        low, high = _span([curve for _, curve in curves])
        axes.set_ylim(low, high)

    return Panel(f"{scale.model}, {scale.amount:,} {scale.unit}", "steps", "training loss (nats)", draw)


def _span(curves: Iterable[Curve]) -> tuple[float, float]:
    """The range of the losses without the first tenth, in which every loss falls steeply."""
    late = [loss for curve in curves for step, loss in curve.items() if step * 10 >= max(curve)]
    margin = 0.06 * (max(late) - min(late)) or 0.1
    return min(late) - margin, max(late) + margin


def smoothed(curve: Curve, points: int = POINTS) -> Curve:
    """Means over windows of equal length, at most `points` of them, each at its last step; short curves unchanged."""
    steps = list(curve)
    width = max(1, len(steps) // 40, -(-len(steps) // points))
    windows = [steps[i : i + width] for i in range(0, len(steps), width)]
    return {window[-1]: statistics.fmean(curve[step] for step in window) for window in windows if window}


# -- scatter plots --------------------------------------------------------------------------


def _scatter(found: Collected, tables: dict[str, Table], what: str) -> list[Panel | None]:
    pretrained, panels = _pretrained_rows(tables), []
    if pretrained:
        scale, rows = pretrained[0]
        panels.append(
            _points_panel(
                f"pretraining: {scale.model}",
                "validation loss (nats), lower is better",
                pretrained_points(found, scale, rows, what),
                what,
            )
        )
    for group in tables["viii"].groups[:1]:
        points, measure = tuned_points(group.rows, tables["ix"].groups[0].rows, what)
        panels.append(
            _points_panel(f"finetuning: {group.scale.model}", f"{measure} (%), higher is better", points, what)
        )
    return panels


@dataclass(frozen=True)
class Point:
    """One model: `x` in bytes or worker-hours; `measured`: whether x was measured completely, see `_cost`."""

    x: float
    y: float
    kind: str
    bits: int
    label: str
    measured: bool = True


def pretrained_points(found: Collected, scale: Scale, rows: list[Row], what: str) -> list[Point]:
    """The validation loss of each row; for "size" also of the same models at fewer bits."""
    points = []
    for row in rows:
        loss, name = row.values["val_loss"], f"r{row.rank}" if row.rank else row.kind
        x, measured = _cost(row, what)
        if loss and x is not None:
            points.append(Point(x, loss.mean, row.kind, row.bits or 16, name, measured))
    return points + (_scored_points(found, rows) if what == "size" else [])


def _cost(row: Row, what: str) -> tuple[float | None, bool]:
    """Bytes or worker-hours, and whether they were measured completely.

    Sizes counted from parameters were not, nor were hours without those of an initial model that MLflow does not have.
    """
    if what == "time":
        # A model that starts from another's weights includes the cost of that one's training.
        hours, whole = row.values["worker_hours"], row.values.get("worker_hours_with_start")
        known = whole is not None or not any(run.setting("model.path") for run in row.runs)
        value = whole or hours
        return (value.mean if value else None), known
    bits = row.bits or 16
    sizes = [size for run in row.runs if (size := run.metrics.get(f"size_{bits}bit_bytes")) is not None]
    if sizes:
        return statistics.fmean(sizes), True
    params = row.values["params_total"]
    return (BYTES_16BIT * params.mean if params and bits == 16 else None), False


def _scored_points(found: Collected, rows: list[Row]) -> list[Point]:
    """One per row and number of bits at which its trained models were scored; means over the seeds."""
    points = []
    for row in rows:
        ids = {run.id for run in row.runs}
        scored = [run for run in found.scored if run.tags[SCORED_FROM] in ids]
        for bits in (8, 4):
            runs = [run for run in scored if run.whole("quantization.bits") == bits]
            losses = [loss for run in runs if (loss := run.metrics.get("val_loss")) is not None]
            sizes = [size for run in runs if (size := run.size(bits)) is not None]
            if losses and sizes:
                name = f"r{row.rank}" if row.rank else row.kind
                points.append(Point(statistics.fmean(sizes), statistics.fmean(losses), row.kind, bits, name))
    return points


def tuned_points(scores: list[Row], costs: list[Row], what: str) -> tuple[list[Point], str]:
    """The adapters, and their measure of quality: F1 of held-out labels, or the mean of the financial tasks."""
    key = "size_gb" if what == "size" else "worker_hours"
    held_out = any(row.values["held_out_f1"] for row in scores)
    points = []
    for row, cost in zip(scores, costs, strict=True):
        if row.kind == "base" and (what == "time" or held_out):
            continue  # it was not finetuned
        tasks = [value.mean for task in FINANCIAL if (value := row.values[task])]
        quality = row.values["held_out_f1"].mean if row.values["held_out_f1"] else None
        y = quality if held_out else statistics.fmean(tasks) if tasks else None
        x = cost.values[key]
        if x and y is not None:
            name = f"r{row.rank}" if row.rank else "base"
            points.append(Point(x.mean * (1e9 if what == "size" else 1), y, row.kind, row.bits or 16, name))
    return points, "weighted F1 of held-out labels" if held_out else "mean of FPB, FiQA SA and TFNS"


def _points_panel(title: str, y: str, points: list[Point], what: str) -> Panel | None:
    if not points:
        return None
    # Minutes if all times are short, else hours; megabytes.
    short = what == "time" and max(point.x for point in points) < 1
    factor, x = (60, "worker-minutes") if short else (1, "worker-hours") if what == "time" else (1e-6, "size (MB)")

    def draw(axes: Axes, ink: str) -> None:
        kinds = {point.kind for point in points}
        for point in points:
            color = COLORS.get(point.kind) or BITS_COLORS.get(point.bits, ink)
            axes.scatter(
                point.x * factor,
                point.y,
                s=42,
                marker=MARKERS.get(point.bits, "o"),
                edgecolors=color,
                facecolors=color if point.measured else "none",
                linewidths=1.4,
            )
            text = axes.annotate(
                point.label,
                (point.x * factor, point.y),
                xytext=(6, 3),
                textcoords="offset points",
                fontsize=7.5,
                color=ink,
            )
            text.set_in_layout(True)
        for kind in [kind for kind in COLORS if kind in kinds]:
            axes.scatter([], [], color=COLORS[kind], label=METHOD_NAMES.get(kind, kind))
        for bits in [bits for bits in BITS_COLORS if ("lora", bits) in {(p.kind, p.bits) for p in points}]:
            axes.scatter([], [], color=BITS_COLORS[bits], marker=MARKERS[bits], label=f"adapter, {bits}-bit base")
        axes.margins(0.14)

    return Panel(title, x, y, draw)


def make_figure(
    key: str, title: str, caption: str, panels: Sequence[Panel | None], above: str | None = None
) -> Figure | None:
    """Draw what there is of some panels; None if there is nothing. `above`: a title inside the PNG."""
    shown = [panel for panel in panels if panel is not None]
    if not shown:
        return None
    svg = drawn(key, shown, INK, "svg").decode()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    return Figure(key, title, caption, len(shown), svg, drawn(key, shown, PAPER_INK, "png", above))
