"""The columns of each table, and the format of the figures in its cells; tables as plain rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from finhpc.commands.report.paper import PaperRow
from finhpc.commands.report.runs import Scale
from finhpc.commands.report.tables import Row, Table, Value

MISSING = "-"
Form = Callable[[float], str]


@dataclass(frozen=True)
class Column:
    """A column of the paper's table, or an additional one (`own`). `second`: a figure in brackets after the first."""

    title: str
    key: str
    form: Form
    over: str = ""  # a heading above several columns
    own: bool = False
    second: tuple[str, Form] | None = None

    @property
    def keys(self) -> list[str]:
        return [self.key, *([self.second[0]] if self.second else [])]


def percent(value: float) -> str:
    return f"{value:.1f}"


def count(value: float) -> str:
    """127.4 M or 1.56 B, as in the paper."""
    if value >= 2e8:
        return f"{value / 1e9:.2f} B"
    return f"{value / 1e6:.1f} M" if value >= 1e7 else f"{value / 1e6:.2f} M" if value >= 1e5 else f"{value:,.0f}"


def size(value: float) -> str:
    """Bytes in decimal units."""
    if value >= 2e8:
        return f"{value / 1e9:.2f} GB"
    return f"{value / 1e6:.1f} MB" if value >= 1e7 else f"{value / 1e6:.2f} MB"


def three(value: float) -> str:
    """Three significant digits, and all digits before the point."""
    if value >= 100:
        return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"
    return f"{value:.{2 if value >= 1 else 3 if value >= 0.1 else 4}f}"


def loss(value: float) -> str:
    return f"{value:.3f}"


def whole(value: float) -> str:
    return f"{value:,.0f}"


_GENERAL = [Column(*of, form=percent) for of in (("BoolQ", "boolq"), ("PIQA", "piqa"), ("WinoGrande", "winogrande"))]
_FINANCIAL = [Column(*of, form=percent) for of in (("FPB", "fpb"), ("FiQA SA", "fiqa_sa"), ("TFNS", "tfns"))]
_PRETRAINED = [
    *_GENERAL,
    Column("#Params. (Model size)", "params_total", count, second=("size_8bit_bytes", size)),
    Column("Memory (GB)", "memory_gb", three),
    Column("Time (hours)", "worker_hours", three),
]
_LOSS = Column("Val. loss", "val_loss", loss, own=True)
COLUMNS: dict[str, list[Column]] = {
    "vi": [*_PRETRAINED, _LOSS, Column("Tokens/s", "tokens_per_s", whole, own=True)],
    "vii": [*_PRETRAINED, Column("With start", "worker_hours_with_start", three, own=True), _LOSS],
    "viii": [*_GENERAL, *_FINANCIAL, Column("Held-out F1", "held_out_f1", percent, own=True), _LOSS],
    "ix": [
        Column("#Params", "params_trainable", count, "Finetuning"),
        Column("Memory (GB)", "memory_gb", three, "Finetuning"),
        Column("Time (hours)", "worker_hours", three, "Finetuning"),
        Column("Model Size (GB)", "size_gb", three, "Inference"),
        Column("Time (seconds)", "inference_s", three, "Inference"),
    ],
}


def spread(value: Value | None, form: Form) -> str:
    """Half of the spread over the seeds, with as many decimals as the figure; empty if there is none."""
    if value is None or not value.spread:
        return ""
    decimals = len(form(value.mean).partition(".")[2])
    return f"{value.spread / 2:.{decimals}f}"


def rows_of(table: Table) -> list[dict[str, Any]]:
    """The table as plain rows: our figures, their spread, and the paper's, then the paper's other rows.

    A figure that was not measured is None.
    """
    rows = [_plain(table.key, group.scale, row, row.paper) for group in table.groups for row in group.rows]
    return rows + [_plain(table.key, None, None, paper) for paper in table.others]


def _plain(key: str, scale: Scale | None, row: Row | None, paper: PaperRow | None) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "model": row.label if row else None,
        "paper_model": paper.label if paper else None,
        "scale_model": scale.model if scale else None,
        "scale_params": scale.params if scale else None,
        "scale_data": scale.data if scale else None,
        "scale_amount": scale.amount if scale else None,
        "scale_unit": scale.unit if scale else None,
        "seeds": row.train_seeds if row else None,
        "settings_tried": row.settings if row else None,
        "remark": row.remark if row else None,
    }
    for name in [name for column in COLUMNS[key] for name in column.keys]:
        value = row.values.get(name) if row else None
        plain[name] = value.mean if value else None
        plain[f"{name}_spread"] = value.spread if value else None
        plain[f"{name}_paper"] = paper.values.get(name) if paper else None
    return plain
