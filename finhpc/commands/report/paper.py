"""The figures of the paper's Tables VI to IX (`paper.yaml`), and the choice of its row for one of ours."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import yaml

NEAR = 0.1  # shares of the width that differ by less than this tenth are the same: the paper's own are 0.25 and 0.24
# Speed-up of inference by a low-rank model of any rank, methods 1 and 2 (section VI.B, last paragraph).
INFERENCE_SPEEDUP = {"GPT2-127M": 0.06 / 0.05, "GPT2-1.5B": 0.43 / 0.23}
# The abstract: a rise of 6.3 and 24.0 points over the base, and memory 6.3 times less than finetuning all weights.
TUNED_GENERAL, TUNED_FINANCIAL, TUNED_MEMORY = 6.3, 24.0, 6.3


@dataclass(frozen=True)
class PaperModel:
    """A model of the paper; `params`: of the dense one, `width`: its hidden size n."""

    name: str
    params: float
    width: int


@dataclass(frozen=True)
class PaperRow:
    """A row of a table; `rank` is None for the dense model or the base, `bits` outside Tables VIII and IX."""

    model: PaperModel
    rank: int | None
    bits: int | None
    values: dict[str, float]
    printed: dict[str, str]  # as the paper has them

    @property
    def label(self) -> str:
        rank = f"-r{self.rank}" if self.rank else ""
        return f"{self.model.name}{rank}" + (f" ({self.bits}-bit)" if self.bits else "")


@dataclass(frozen=True)
class PaperTable:
    """One of the paper's tables, in its order."""

    title: str
    rows: list[PaperRow]

    def nearest_model(self, params: float) -> PaperModel:
        """The table's model that is nearest in size, by the ratio of parameters."""
        return min((row.model for row in self.rows), key=lambda model: abs(math.log(model.params / params)))

    def pretrained(self, params: float, rank: int | None, width: int | None) -> PaperRow | None:
        """The row of the model nearest in size, its rank the same share of the width; `rank` None: the dense one."""
        model = self.nearest_model(params)
        if rank is None:
            return next(row for row in self.rows if row.model == model and row.rank is None)
        if width is None:
            return None
        ranked = [row for row in self.rows if row.model == model and row.rank]
        near = [row for row in ranked if abs((rank / width) / ((row.rank or 0) / model.width) - 1) < NEAR]
        return near[0] if near else None

    def finetuned(self, params: float, rank: int | None, bits: int | None) -> PaperRow | None:
        """The row of the base nearest in size with the same LoRA rank and bits; `rank` None: the base."""
        model = self.nearest_model(params)
        same = [row for row in self.rows if (row.model, row.rank, row.bits) == (model, rank, bits)]
        return same[0] if same else None


@cache
def paper_tables() -> dict[str, PaperTable]:
    """vi, vii, viii and ix."""
    text = (files("finhpc.commands.report") / "paper.yaml").read_text(encoding="utf-8")
    tree = yaml.load(text, yaml.BaseLoader)  # all of it as text: 121.0 is printed so
    models = {name: PaperModel(name, float(of["params"]), int(of["width"])) for name, of in tree["models"].items()}
    return {
        key: PaperTable(table["title"], [_row(models[row["model"]], row) for row in table["rows"]])
        for key, table in tree["tables"].items()
    }


def _row(model: PaperModel, row: dict[str, str]) -> PaperRow:
    printed = {name: value for name, value in row.items() if name not in ("model", "rank", "bits")}
    rank, bits = (int(row[name]) if name in row else None for name in ("rank", "bits"))
    return PaperRow(model, rank, bits, {name: float(value) for name, value in printed.items()}, printed)
