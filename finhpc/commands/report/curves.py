"""Loss curves of `report` and `study`: their mean over seeds, where they fall to a loss, and panels that show them."""

from __future__ import annotations

import io
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curve = dict[int, float]  # step -> loss in nats


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean at every step that all curves have; empty if there is none."""
    shared = set.intersection(*(set(curve) for curve in curves)) if curves else set()
    return {step: statistics.fmean(curve[step] for curve in curves) for step in sorted(shared)}


def steps_to(curve: Curve, target: float) -> float | None:
    """The step at which a curve falls to `target`, interpolated linearly; None if it never does."""
    before: tuple[int, float] | None = None
    for step, loss in curve.items():
        if loss <= target:
            if before is None:
                return float(step)
            return before[0] + (step - before[0]) * (before[1] - target) / (before[1] - loss)
        before = step, loss
    return None


@dataclass(frozen=True)
class Panel:
    """One pair of axes, and the function that draws on it in an ink."""

    title: str
    x: str
    y: str
    draw: Callable[[Axes, str], None]


def drawn(key: str, panels: Sequence[Panel], ink: str, form: str, title: str | None = None) -> bytes:
    """The panels side by side, or in two columns if there are more than three, as a picture in `form`, png or svg.

    `key`: identifies it among others of a page.
    """
    import matplotlib
    from matplotlib.figure import Figure

    # Names of runs are text, not formulas; the ids in the figures of a page must differ.
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
    columns = len(panels) if len(panels) < 4 else 2
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(7.6 if columns == 1 else 5.6 * columns, 4.3 * rows), layout="constrained")
        every = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes in every[len(panels) :]:
            axes.set_visible(False)
        for axes, panel in zip(every, panels, strict=False):
            axes.set_facecolor("none")
            axes.grid(alpha=0.18, color=ink, lw=0.6)
            axes.spines[["top", "right"]].set_visible(False)
            axes.set(xlabel=panel.x, ylabel=panel.y)
            axes.set_title(panel.title, fontsize=10)
            panel.draw(axes, ink)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize=8, frameon=False, labelcolor=ink)
        if title:
            figure.suptitle(title)
        svg = form == "svg"
        figure.savefig(buffer, format=form, dpi=150, transparent=svg, metadata={"Date": None} if svg else None)
    return buffer.getvalue()
