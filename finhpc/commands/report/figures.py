"""Figures 6 and 7 and the scatter plots, drawn once on paper (PNG) and once in the page's own colours (SVG)."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finhpc.commands.report.curves import mean_curve, smoothed
from finhpc.commands.report.points import Point, pretrained_points, tuned_points
from finhpc.commands.report.runs import Collected, Curve, Scale
from finhpc.commands.report.tables import Row, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS = 2  # as in the paper; the scales where most was compared
COLOURS = {  # readable on white and on black
    "dense": "#8a8f98",
    "low_rank": "#3b82c4",
    "svd": "#e0812f",
    "blend": "#3fa45b",
    "cola": "#a06cc9",
    "base": "#8a8f98",
}
BITS_COLOURS = {16: "#3b82c4", 8: "#e0812f", 4: "#3fa45b"}
METHOD_NAMES = {
    "dense": "dense",
    "low_rank": "method 1",
    "svd": "method 2",
    "blend": "method 3 (not in the paper)",
    "cola": "CoLA (not in the paper)",
}
STYLES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (1.2, 1.4)), (0, (6, 1.5, 1.2, 1.5)))  # by rank, largest first
MARKERS = {16: "o", 8: "s", 4: "^"}
INK, PAPER_INK = "#123457", "#1f2328"  # the first stands for the page's own colour
Draw = Callable[[Any, str], None]  # onto a matplotlib figure, in a colour


@dataclass(frozen=True)
class Figure:
    """A drawn figure. `svg` takes the colour of the text around it."""

    key: str
    title: str
    caption: str
    panels: int
    svg: str
    png: bytes


@dataclass(frozen=True)
class _Panel:
    """One pair of axes: a title, and what is drawn."""

    title: str
    x: str
    y: str
    draw: Callable[[Axes, str], None]
    log: bool = False


def make_figures(found: Collected, tables: dict[str, Table]) -> list[Figure]:
    """Those that there is something to show in."""
    made = [
        _figure(
            "figure-6",
            "Figure 6: training loss for pretraining, methods 1 and 2",
            "Training loss against steps; each point is the mean of the steps since the one before, over the seeds.",
            [_loss_panel(found, scale, rows) for scale, rows in _pretrained_rows(tables)[:PANELS]],
        ),
        _figure(
            "figure-7",
            "Figure 7: training loss for finetuning",
            "Training loss of adapters over one frozen base, by rank and by the base's bits.",
            [
                _loss_panel(found, group.scale, [row for row in group.rows if row.kind == "lora"], tuned=True)
                for group in tables["viii"].groups[:PANELS]
            ],
        ),
        _figure(
            "quality-size",
            "Quality against size",
            "Hollow: 16 bits counted as 2 bytes a parameter, because no size was logged. Circles 16 bits, squares 8, "
            "triangles 4.",
            _scatter(found, tables, "size"),
        ),
        _figure(
            "quality-time",
            "Quality against time",
            "Workers x the running time of the command; for methods 2 and 3 with that of the dense model they start "
            "from, or hollow where MLflow does not know it.",
            _scatter(found, tables, "time"),
        ),
    ]
    return [figure for figure in made if figure is not None]


def save_png(figure: Figure, folder: Path) -> Path:
    path = folder / f"{figure.key}.png"
    path.write_bytes(figure.png)
    return path


# -- loss curves ----------------------------------------------------------------------------


def _pretrained_rows(tables: dict[str, Table]) -> list[tuple[Scale, list[Row]]]:
    """Scale -> the rows of both tables, those first that compare most."""
    found: dict[Scale, dict[str, Row]] = {}
    for key in ("vi", "vii"):
        for group in tables[key].groups:
            rows = found.setdefault(group.scale, {})
            for row in group.rows:
                rows.setdefault(f"{row.kind} {row.label}", row)
    ordered = sorted(found.items(), key=lambda item: (-len(item[1]), -item[0].amount))
    return [(scale, list(rows.values())) for scale, rows in ordered]


def _loss_panel(found: Collected, scale: Scale, rows: Sequence[Row], tuned: bool = False) -> _Panel | None:
    curves = [(row, smoothed(mean_curve(found, row.runs, "train_loss"))) for row in rows if row.runs]
    curves = [(row, curve) for row, curve in curves if len(curve) > 1]
    if not curves:
        return None

    def draw(axes: Axes, ink: str) -> None:
        ranks = sorted({row.rank for row, _ in curves if row.rank}, reverse=True)
        for row, curve in curves:
            style = STYLES[ranks.index(row.rank) % len(STYLES)] if row.rank else "-"
            colour = BITS_COLOURS.get(row.bits or 16) if tuned else COLOURS.get(row.kind)
            label = f"r = {row.rank}, {row.bits} bits" if tuned else _line_name(row)
            axes.plot(list(curve), list(curve.values()), color=colour, ls=style, lw=1.6, label=label)
        low, high = _span([curve for _, curve in curves])
        axes.set_ylim(low, high)
        axes.legend(fontsize=8, frameon=False, labelcolor=ink)

    return _Panel(f"{scale.model}, {scale.amount:,} {scale.unit}", "steps", "training loss (nats)", draw)


def _line_name(row: Row) -> str:
    name = METHOD_NAMES.get(row.kind, row.kind)
    bits = f", {row.bits} bits" if row.bits else ""
    return f"{name}, r = {row.rank}{bits}" if row.rank else f"{name}{bits}"


def _span(curves: Iterable[Curve]) -> tuple[float, float]:
    """From the lowest loss to the highest but for the first tenth, where every loss falls steeply."""
    late = [loss for curve in curves for step, loss in curve.items() if step * 10 >= max(curve)]
    room = 0.06 * (max(late) - min(late)) or 0.1
    return min(late) - room, max(late) + room


# -- scatter plots --------------------------------------------------------------------------


def _scatter(found: Collected, tables: dict[str, Table], what: str) -> list[_Panel | None]:
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


def _points_panel(title: str, y: str, points: list[Point], what: str) -> _Panel | None:
    if not points:
        return None
    # Of hours, minutes where all are short; of bytes, megabytes.
    short = what == "time" and max(point.x for point in points) < 1
    factor, x = (60, "worker-minutes") if short else (1, "worker-hours") if what == "time" else (1e-6, "size (MB)")

    def draw(axes: Axes, ink: str) -> None:
        named: set[str] = set()
        for point in points:
            colour = COLOURS.get(point.kind) or BITS_COLOURS.get(point.bits, ink)
            axes.scatter(
                point.x * factor,
                point.y,
                s=42,
                marker=MARKERS.get(point.bits, "o"),
                edgecolors=colour,
                facecolors=colour if point.measured else "none",
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
            named.add(point.kind)
        for kind in [kind for kind in COLOURS if kind in named]:
            axes.scatter([], [], color=COLOURS[kind], label=METHOD_NAMES.get(kind, kind))
        for bits in [bits for bits in BITS_COLOURS if ("lora", bits) in {(p.kind, p.bits) for p in points}]:
            axes.scatter([], [], color=BITS_COLOURS[bits], marker=MARKERS[bits], label=f"adapter, {bits}-bit base")
        axes.margins(0.14)
        axes.legend(fontsize=8, frameon=False, labelcolor=ink)

    return _Panel(title, x, y, draw)


# -- drawing --------------------------------------------------------------------------------


def _figure(key: str, title: str, caption: str, panels: Sequence[_Panel | None]) -> Figure | None:
    shown = [panel for panel in panels if panel is not None]
    if not shown:
        return None
    svg = _drawn(key, shown, INK, "svg").decode()
    return Figure(
        key,
        title,
        caption,
        len(shown),
        svg[svg.index("<svg") :].replace(INK, "currentColor"),
        _drawn(key, shown, PAPER_INK, "png"),
    )


def _drawn(key: str, panels: list[_Panel], ink: str, form: str) -> bytes:
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    # Names of runs are text, not formulas; ids in several pictures of one page must differ.
    settings: Any = {
        "text.parse_math": False,
        "svg.fonttype": "none",
        "svg.hashsalt": key,
        "font.size": 9,
        "text.color": ink,
        "axes.labelcolor": ink,
        "axes.edgecolor": ink,
        "xtick.color": ink,
        "ytick.color": ink,
    }
    buffer = io.BytesIO()
    with matplotlib.rc_context(settings):
        canvas = Canvas(figsize=(11.2 if len(panels) > 1 else 7.6, 4.3), layout="constrained")
        for axes, panel in zip(canvas.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            axes.set_facecolor("none")
            axes.grid(alpha=0.18, color=ink, lw=0.6)
            axes.spines[["top", "right"]].set_visible(False)
            axes.set(xlabel=panel.x, ylabel=panel.y)
            axes.set_title(panel.title, fontsize=10)
            panel.draw(axes, ink)
        canvas.savefig(
            buffer, format=form, dpi=150, transparent=form == "svg", metadata={"Date": None} if form == "svg" else None
        )
    return buffer.getvalue()
