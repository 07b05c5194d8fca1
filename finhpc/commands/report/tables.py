"""The rows of the paper's Tables VI to IX from tracked runs, each with the paper's row of the same kind.

Runs that only differ in their seed are one row. If the runs of a row differ in other settings, such as the learning
rate, the best setting represents it. A figure that was not measured is None, never zero.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from finhpc.commands.report.paper import PaperRow, paper_tables
from finhpc.commands.report.runs import FINANCIAL, GENERAL, Collected, Scale, Tracked

METHODS = {  # the method, see `_kind` -> the suffix of the model's name, and whether the paper has the method
    "vi": {
        "dense": ("", True),
        "low_rank": ("", True),
        "cola": (" (CoLA)", False),
        "half": (" (half-linear)", False),
        "sltrain": (" (SLTrain)", False),
        "guided": (" (self-guided)", False),
    },
    "vii": {"dense": ("", True), "svd": ("", True), "blend": (" (method 3)", False)},
}
NOT_IN_PAPER = "not in the paper"


@dataclass(frozen=True)
class Value:
    """A mean over seeds, and their largest minus their smallest value if there are several."""

    mean: float
    spread: float | None = None


Values = dict[str, Value | None]


@dataclass(frozen=True)
class Row:
    """One row of ours. `runs`: one per seed; `settings`: the number of settings it is the best of."""

    label: str
    kind: str  # the method, or `base` and `lora`
    rank: int | None
    bits: int | None
    values: Values
    paper: PaperRow | None
    runs: tuple[Tracked, ...] = ()
    settings: int = 1
    remark: str = ""

    @property
    def train_seeds(self) -> int:
        """The number of seeds it is the mean of; 0 for a base that no run here made."""
        return len(self.runs)

    @property
    def notes(self) -> list[str]:
        """What to print after the label."""
        notes = [self.remark] if self.remark else []
        notes += [f"{self.train_seeds} seeds"] if self.train_seeds > 1 else []
        return notes + ([f"best of {self.settings} settings"] if self.settings > 1 else [])


@dataclass(frozen=True)
class Group:
    """Rows that can be compared with each other."""

    scale: Scale
    rows: list[Row]

    def find(self, kind: str, rank: int | None = None, bits: int | None = None) -> Row | None:
        """The first row of that method, rank and bits; None matches any rank or bits."""
        rows = (row for row in self.rows if row.kind == kind and rank in (None, row.rank) and bits in (None, row.bits))
        return next(rows, None)


@dataclass(frozen=True)
class Table:
    """One table: groups of our rows, the largest first, and the paper's rows without a counterpart (`others`)."""

    key: str
    title: str
    groups: list[Group] = field(default_factory=list)

    @property
    def others(self) -> list[PaperRow]:
        used = [row.paper for group in self.groups for row in group.rows]
        return [row for row in paper_tables()[self.key].rows if row not in used]

    @property
    def has_spreads(self) -> bool:
        """Whether any figure is a mean over several seeds."""
        values = [value for group in self.groups for row in group.rows for value in row.values.values()]
        return any(value is not None and value.spread is not None for value in values)


def make_tables(found: Collected) -> dict[str, Table]:
    """vi, vii, viii and ix."""
    titles = {key: table.title for key, table in paper_tables().items()}
    tables = {key: Table(key, titles[key], _pretrained(found, key)) for key in ("vi", "vii")}
    tuned = _tuned_groups(found)
    return tables | {
        key: Table(key, titles[key], [_tuned(found, key, *group) for group in tuned]) for key in ("viii", "ix")
    }


# -- Tables VI and VII ----------------------------------------------------------------------


def _pretrained(found: Collected, key: str) -> list[Group]:
    kinds = METHODS[key]
    runs = [run for run in found.pretrained if _kind(run) in kinds]
    groups = []
    for scale, same_scale in _grouped(runs, found.scale):
        rows = [_pretrained_row(found, key, scale, same_row) for _, same_row in _grouped(same_scale, _row_key)]
        rows.sort(key=lambda row: (list(kinds).index(row.kind), -(row.rank or 0), row.label))
        groups.append(Group(scale, rows))
    if key == "vii":  # a dense model alone has nothing to do with method 2
        groups = [group for group in groups if any(row.kind != "dense" for row in group.rows)]
    # Those that compare most first; equal ones by their amount of training.
    return sorted(groups, key=lambda group: (-len(group.rows), -group.scale.amount))


def _kind(run: Tracked) -> str:
    """Its method.kind; `guided` for a blend that started from no model."""
    kind = run.setting("method.kind") or ""
    return "guided" if kind == "blend" and not run.setting("model.path") else kind


def _row_key(run: Tracked) -> tuple[Any, ...]:
    """Runs of one row have the same method, ranks, bits in training, and kind of initial weights."""
    kind = _kind(run)
    if kind == "dense":
        return kind, _training_bits(run), bool(run.setting("model.path"))
    ranks = [run.setting(key) for key in ("method.ranks", "method.qkv", "method.head", "method.embedding")]
    return kind, _training_bits(run), run.whole("method.rank"), *ranks, run.setting("method.init") == "dlr"


def _training_bits(run: Tracked) -> int | None:
    """The bits of the weights during training; None at 16."""
    bits = run.whole("quantization.bits") if run.setting("quantization.when") == "during" else 16
    return bits if bits and bits < 16 else None


def _pretrained_row(found: Collected, key: str, scale: Scale, runs: list[Tracked]) -> Row:
    chosen, settings = _best(runs, lambda run: -run.metrics.get("val_loss", float("inf")))
    first = chosen[0]
    kind = _kind(first)
    rank = first.whole("method.rank") if kind != "dense" else None
    bits, continued = _training_bits(first), kind == "dense" and bool(first.setting("model.path"))
    after, in_paper = METHODS[key][kind]
    label = scale.model + (f"-r{rank}" if rank else "") + _rank_words(first, kind) + after
    label += f" ({bits}-bit)" if bits else ""
    label += " (trained on)" if continued else ""
    own = first.setting("method.qkv") == "separate" or first.setting("method.init") == "dlr"
    in_paper = in_paper and not bits and not continued and not own
    table, paper = paper_tables()[key], None
    if in_paper and scale.params:
        paper = table.pretrained(scale.params, rank, scale.width)
    names = "params_total", "size_8bit_bytes", "worker_hours", "val_loss", "tokens_per_s"
    values = _values(chosen, GENERAL, names)
    if key == "vii":
        values["worker_hours_with_start"] = _mean(_with_start(found, run) for run in chosen)
    return Row(label, kind, rank, bits, values, paper, chosen, settings, "" if in_paper else NOT_IN_PAPER)


def _rank_words(run: Tracked, kind: str) -> str:
    """The settings of structure other than `method.rank`, in words."""
    if kind == "dense":
        return ""
    ranks = run.listed("method.ranks") or {}
    words = [f"{name} {rank}" for name, rank in ranks.items()]
    words += ["q, k, v apart"] if run.setting("method.qkv") == "separate" else []
    words += ["DLR"] if run.setting("method.init") == "dlr" else []
    words += ["dense head"] if run.setting("method.head") == "dense" else []
    words += ["low-rank embedding"] if run.setting("method.embedding") == "low_rank" else []
    return f" ({', '.join(words)})" if words else ""


def _with_start(found: Collected, run: Tracked) -> float | None:
    """Worker-hours including those of every model that it descends from; None if MLflow does not have them all."""
    hours: list[float | None] = []
    seen: set[str] = set()
    origin: Tracked | None = run
    while origin is not None and origin.id not in seen:
        seen.add(origin.id)
        hours.append(origin.metrics.get("worker_hours"))
        if not origin.setting("model.path"):
            known = [own for own in hours if own is not None]
            return sum(known) if len(known) == len(hours) else None
        origin = found.start_of(origin)
    return None


# -- Tables VIII and IX ---------------------------------------------------------------------


def _tuned_groups(found: Collected) -> list[tuple[Scale, str, list[list[Tracked]]]]:
    """The scale, the base's path, and the runs of each row, which have the same rank, bits and scheme."""
    groups = []
    by_base = _grouped(found.finetuned, lambda run: (found.scale(run), run.setting("model.path") or ""))
    for (scale, path), runs in by_base:
        rows = _grouped(runs, lambda run: (run.whole("lora.rank"), run.whole("quantization.bits"), _scheme(run)))
        groups.append((scale, path, [same_row for _, same_row in rows]))
    return sorted(groups, key=lambda group: (-len(group[2]), -group[0].amount))


def _scheme(run: Tracked) -> str:
    """The quantization scheme, if it is not the default of its bits."""
    scheme, bits = run.setting("quantization.scheme"), run.whole("quantization.bits")
    return "" if bits == 16 or scheme in (None, "auto", {8: "int8", 4: "nf4"}.get(bits or 16)) else f", {scheme}"


def _tuned(found: Collected, key: str, scale: Scale, path: str, rows: list[list[Tracked]]) -> Group:
    tuned = [_tuned_row(key, scale, runs) for runs in rows]
    order = [(row.rank, row.bits) for row in paper_tables()[key].rows]

    def place(row: Row) -> tuple[int, int, int, str]:
        at = order.index((row.rank, row.bits)) if (row.rank, row.bits) in order else len(order)
        return at, row.rank or 0, row.bits or 0, row.label

    return Group(scale, [_base_row(found, key, scale, path), *sorted(tuned, key=place)])


def _tuned_row(key: str, scale: Scale, runs: list[Tracked]) -> Row:
    chosen, settings = _best(runs, _tuned_quality)
    first = chosen[0]
    rank, bits = first.whole("lora.rank"), first.whole("quantization.bits")
    values = _values(chosen, (*GENERAL, *FINANCIAL), ("params_trainable", "worker_hours", "val_loss"))
    values["held_out_f1"] = _mean(_over(run.metrics.get("held_out_weighted_f1"), 0.01) for run in chosen)
    values |= inference(chosen, bits)
    paper = paper_tables()[key].finetuned(scale.params, rank, bits) if scale.params and not _scheme(first) else None
    label = f"{scale.model}-r{rank} ({bits}-bit{_scheme(first)})"
    return Row(label, "lora", rank, bits, values, paper, chosen, settings, "" if paper else NOT_IN_PAPER)


def _tuned_quality(run: Tracked) -> float:
    """Larger is better: weighted F1 of held-out labels; without labels a value below any F1."""
    f1 = run.metrics.get("held_out_weighted_f1")
    return f1 if f1 is not None else -run.metrics.get("val_loss", float("inf"))


def _base_row(found: Collected, key: str, scale: Scale, path: str) -> Row:
    """The base before finetuning: scores from any run, the other figures from the run that made it, if there is one.

    The scores of the run that made the model, which `finhpc evaluate` adds to it, come before those of evaluations
    that scored the model unchanged and without an adapter; of these the newest counts.
    """
    maker = found.makers.get(path.rstrip("/"))
    runs = (maker,) if maker else ()
    evaluations = [evaluation for evaluation in found.evaluations if _scored_bare(evaluation, path)]
    values = _values(runs, (*GENERAL, *FINANCIAL), ("worker_hours",))
    for run in (*evaluations, *runs):
        values |= {task: _mean([score]) for task in (*GENERAL, *FINANCIAL) if (score := run.score(task)) is not None}
    values |= {"params_trainable": _mean([scale.params or None]), "held_out_f1": None, "val_loss": None}
    values |= inference(runs or evaluations, 16)
    paper = paper_tables()[key].finetuned(scale.params, None, None) if scale.params else None
    return Row(scale.model, "base", None, None, values, paper, runs)


def _scored_bare(evaluation: Tracked, path: str) -> bool:
    """Whether an evaluation scored the model in `path` without an adapter, at the bits in which it is stored."""
    if evaluation.whole("quantization.bits") not in (None, 16):
        return False
    models, adapters = evaluation.listed("model"), evaluation.listed("adapter")
    if len(models) != 1 or any(adapter not in ("none", "") for adapter in adapters):
        return False
    given = os.path.normpath(os.path.expanduser(models[0]))  # may be relative to a folder that is not known here
    return given == path.rstrip("/") or (not os.path.isabs(given) and path.rstrip("/").endswith(f"/{given}"))


# -- values ---------------------------------------------------------------------------------


def inference(runs: Iterable[Tracked], bits: int | None) -> Values:
    """The size in GB at these bits, and seconds per generated token."""
    runs = list(runs)
    seconds = [run.metrics.get("generate_s") or _over(1.0, run.metrics.get("generate_tokens_per_s")) for run in runs]
    return {"size_gb": _mean(_over(run.size(bits or 16), 1e9) for run in runs), "inference_s": _mean(seconds)}


def _grouped(runs: Iterable[Tracked], key: Callable[[Tracked], Any]) -> list[tuple[Any, list[Tracked]]]:
    groups: dict[Any, list[Tracked]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return list(groups.items())


def _best(runs: list[Tracked], quality: Callable[[Tracked], float]) -> tuple[tuple[Tracked, ...], int]:
    """The runs with the best settings, the newest of each seed; and the number of settings."""
    settings = [
        tuple({run.setting("train.seed"): run for run in sorted(same, key=lambda run: run.start_ms)}.values())
        for _, same in _grouped(runs, lambda run: run.meaning)
    ]
    return max(settings, key=lambda same: statistics.fmean(quality(run) for run in same)), len(settings)


def _values(runs: Sequence[Tracked], tasks: Iterable[str], names: Iterable[str]) -> Values:
    """The scores of tasks, metrics by name, and the memory of all workers together."""
    scores: Values = {task: _mean(run.score(task) for run in runs) for task in tasks}
    metrics = {name: _mean(run.metrics.get(name) for run in runs) for name in names}
    return scores | metrics | {"memory_gb": _mean(_over(run.memory_bytes, 1e9) for run in runs)}


def _mean(values: Iterable[float | None]) -> Value | None:
    """The mean of the measured values, and their spread if there are two or more."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Value(statistics.fmean(known), max(known) - min(known) if len(known) > 1 else None)


def _over(value: float | None, divisor: float | None) -> float | None:
    return value / divisor if value is not None and divisor else None
