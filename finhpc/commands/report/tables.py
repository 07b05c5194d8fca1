"""The rows of the paper's Tables VI to IX from tracked runs, each beside the paper's row of the same kind.

Runs that differ in their seed alone are one row. Where runs of one row differ in other settings (a learning
rate), the best of them stands for it. A figure that nobody measured is None, never zero.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from finhpc.commands.report.bases import base_scores, measured_runs
from finhpc.commands.report.paper import PaperRow, paper_tables
from finhpc.commands.report.runs import FINANCIAL, GENERAL, Collected, Scale, Tracked

METHODS = {  # method.kind -> what follows the model's name, and whether the paper's table of its method has it
    "vi": {"dense": ("", True), "low_rank": ("", True), "cola": (" (CoLA)", False)},
    "vii": {"dense": ("", True), "svd": ("", True), "blend": (" (method 3)", False)},
}
NOT_IN_PAPER = "not in the paper"


@dataclass(frozen=True)
class Value:
    """A mean over seeds, and largest less smallest where there are several."""

    mean: float
    spread: float | None = None


Values = dict[str, Value | None]


@dataclass(frozen=True)
class Row:
    """One row of ours. `runs`: one a seed; `settings`: how many settings it is the best of."""

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
        """How many seeds it is the mean of; 0 for a base that no run here made."""
        return len(self.runs)


@dataclass(frozen=True)
class Group:
    """Rows that may be compared with each other."""

    scale: Scale
    rows: list[Row]

    def find(self, kind: str, rank: int | None = None, bits: int | None = None) -> Row | None:
        """The row of that method (its first where `rank` is None), rank and bits."""
        fits = [row for row in self.rows if row.kind == kind and (rank is None or row.rank == rank)]
        fits = [row for row in fits if bits is None or row.bits == bits]
        return fits[0] if fits else None


@dataclass(frozen=True)
class Table:
    """One table: groups of our rows, the largest first, and the rows of the paper that none of ours stands beside."""

    key: str
    title: str
    groups: list[Group] = field(default_factory=list)

    @property
    def others(self) -> list[PaperRow]:
        used = [row.paper for group in self.groups for row in group.rows]
        return [row for row in paper_tables()[self.key].rows if row not in used]


def make_tables(found: Collected) -> dict[str, Table]:
    """vi, vii, viii and ix."""
    titles = {key: table.title for key, table in paper_tables().items()}
    made = {key: Table(key, titles[key], _pretrained(found, key)) for key in ("vi", "vii")}
    tuned = _tuned_groups(found)
    made |= {key: Table(key, titles[key], [_tuned(found, key, *group) for group in tuned]) for key in ("viii", "ix")}
    return made


# -- Tables VI and VII ----------------------------------------------------------------------


def _pretrained(found: Collected, key: str) -> list[Group]:
    kinds = METHODS[key]
    fit = [run for run in found.pretrained if run.setting("method.kind") in kinds]
    groups = []
    for scale, of_scale in _grouped(fit, found.scale):
        rows = [
            _pretrained_row(found, key, scale, runs) for _, runs in _grouped(of_scale, lambda run: _what(found, run))
        ]
        rows.sort(key=lambda row: (list(kinds).index(row.kind), -(row.rank or 0), row.label))
        groups.append(Group(scale, rows))
    if key == "vii":  # a dense model alone says nothing of method 2
        groups = [group for group in groups if any(row.kind != "dense" for row in group.rows)]
    return _largest_first(groups)


def _what(found: Collected, run: Tracked) -> tuple[Any, ...]:
    """What makes a row its own: method, ranks and which layers have them, bits in training, what it starts from."""
    kind = run.setting("method.kind")
    ranked = () if kind == "dense" else (run.whole("method.rank"), *(run.setting(k) for k in _RANK_KEYS))
    started = bool(run.setting("model.path")) if kind == "dense" else None
    return kind, ranked, _training_bits(run), started


_RANK_KEYS = ("method.ranks", "method.head", "method.embedding")


def _training_bits(run: Tracked) -> int | None:
    """Bits of the weights that training computed with; None at 16."""
    bits = run.whole("quantization.bits") if run.setting("quantization.when") == "during" else 16
    return bits if bits and bits < 16 else None


def _pretrained_row(found: Collected, key: str, scale: Scale, runs: list[Tracked]) -> Row:
    chosen, settings = _best(runs, lambda run: -run.metrics.get("val_loss", float("inf")))
    first = chosen[0]
    kind = first.setting("method.kind") or ""
    rank = first.whole("method.rank") if kind != "dense" else None
    bits, continued = _training_bits(first), kind == "dense" and bool(first.setting("model.path"))
    after, in_paper = METHODS[key][kind]
    label = scale.model + (f"-r{rank}" if rank else "") + _apart(first, kind) + after
    label += f" ({bits}-bit)" if bits else ""
    label += " (trained on)" if continued else ""
    in_paper = in_paper and not bits and not continued
    table, paper = paper_tables()[key], None
    if in_paper and scale.params:
        paper = table.pretrained(scale.params, rank, scale.width)
    values: Values = {task: _mean(run.score(task) for run in chosen) for task in GENERAL}
    values |= {name: _figure(chosen, name) for name in ("params_total", "size_8bit_bytes", "worker_hours")}
    values |= {name: _figure(chosen, name) for name in ("val_loss", "tokens_per_s")}
    values["memory_gb"] = _mean(_over(run.memory_bytes, 1e9) for run in chosen)
    if key == "vii":
        values["worker_hours_with_start"] = _mean(_with_start(found, run) for run in chosen)
    return Row(label, kind, rank, bits, values, paper, chosen, settings, "" if in_paper else NOT_IN_PAPER)


def _apart(run: Tracked, kind: str) -> str:
    """What `method.rank` does not say of the ranks."""
    if kind == "dense":
        return ""
    ranks = run.listed("method.ranks") or {}
    said = [f"{name} {rank}" for name, rank in ranks.items()]
    said += ["dense head"] if run.setting("method.head") == "dense" else []
    said += ["low-rank embedding"] if run.setting("method.embedding") == "low_rank" else []
    return f" ({', '.join(said)})" if said else ""


def _with_start(found: Collected, run: Tracked) -> float | None:
    """Worker-hours with those of every model behind the one it starts from; None if MLflow does not have them all."""
    hours: list[float | None] = []
    seen: set[str] = set()
    behind: Tracked | None = run
    while behind is not None and behind.id not in seen:
        seen.add(behind.id)
        hours.append(behind.metrics.get("worker_hours"))
        if not behind.setting("model.path"):
            known = [of_one for of_one in hours if of_one is not None]
            return sum(known) if len(known) == len(hours) else None
        behind = found.start_of(behind)
    return None


# -- Tables VIII and IX ---------------------------------------------------------------------


def _tuned_groups(found: Collected) -> list[tuple[Scale, str, list[list[Tracked]]]]:
    """Scale, base's path, and the runs of each row: of one rank, bits and scheme."""
    groups = []
    by_base = _grouped(found.finetuned, lambda run: (found.scale(run), run.setting("model.path") or ""))
    for (scale, path), runs in by_base:
        rows = _grouped(runs, lambda run: (run.whole("lora.rank"), run.whole("quantization.bits"), _scheme(run)))
        groups.append((scale, path, [of_row for _, of_row in rows]))
    return sorted(groups, key=lambda group: (-len(group[2]), -group[0].amount))


def _scheme(run: Tracked) -> str:
    """The quantiser, where it is not the one its bits mean by themselves."""
    scheme, bits = run.setting("quantization.scheme"), run.whole("quantization.bits")
    return "" if bits == 16 or scheme in (None, "auto", {8: "int8", 4: "nf4"}.get(bits or 16)) else f", {scheme}"


def _tuned(found: Collected, key: str, scale: Scale, path: str, rows: list[list[Tracked]]) -> Group:
    made = [_tuned_row(key, scale, runs) for runs in rows]
    order = [(row.rank, row.bits) for row in paper_tables()[key].rows]

    def place(row: Row) -> tuple[int, int, int, str]:
        at = order.index((row.rank, row.bits)) if (row.rank, row.bits) in order else len(order)
        return at, row.rank or 0, row.bits or 0, row.label

    return Group(scale, [_base_row(found, key, scale, path), *sorted(made, key=place)])


def _tuned_row(key: str, scale: Scale, runs: list[Tracked]) -> Row:
    chosen, settings = _best(runs, _tuned_quality)
    first = chosen[0]
    rank, bits = first.whole("lora.rank"), first.whole("quantization.bits")
    values: Values = {task: _mean(run.score(task) for run in chosen) for task in (*GENERAL, *FINANCIAL)}
    values["held_out_f1"] = _mean(_over(run.metrics.get("held_out_weighted_f1"), 0.01) for run in chosen)
    values |= {name: _figure(chosen, name) for name in ("params_trainable", "worker_hours", "val_loss")}
    values["memory_gb"] = _mean(_over(run.memory_bytes, 1e9) for run in chosen)
    values |= inference(chosen, bits)
    paper = paper_tables()[key].finetuned(scale.params, rank, bits) if scale.params and not _scheme(first) else None
    label = f"{scale.model}-r{rank} ({bits}-bit{_scheme(first)})"
    return Row(label, "lora", rank, bits, values, paper, chosen, settings, "" if paper else NOT_IN_PAPER)


def _tuned_quality(run: Tracked) -> float:
    """Larger is better: weighted F1 of held-out labels, less than any of them where there are none."""
    f1 = run.metrics.get("held_out_weighted_f1")
    return f1 if f1 is not None else -run.metrics.get("val_loss", float("inf"))


def _base_row(found: Collected, key: str, scale: Scale, path: str) -> Row:
    """The base as it was before: scores by whoever scored it, the rest by the run that made it, if one did."""
    maker = found.makers.get(path.rstrip("/"))
    runs = (maker,) if maker else ()
    values: Values = {task: _one(score) for task, score in base_scores(found, path, (*GENERAL, *FINANCIAL)).items()}
    values |= {"params_trainable": _one(scale.params or None), "worker_hours": _figure(runs, "worker_hours")}
    values |= {"memory_gb": _mean(_over(run.memory_bytes, 1e9) for run in runs), "held_out_f1": None, "val_loss": None}
    values |= inference(measured_runs(found, path), 16)
    paper = paper_tables()[key].finetuned(scale.params, None, None) if scale.params else None
    return Row(scale.model, "base", None, None, values, paper, runs)


# -- values ---------------------------------------------------------------------------------


def inference(runs: Iterable[Tracked], bits: int | None) -> Values:
    """Size in GB at these bits, and seconds a generated token."""
    runs = list(runs)
    seconds = [run.metrics.get("generate_s") or _over(1.0, run.metrics.get("generate_tokens_per_s")) for run in runs]
    sizes = [run.metrics.get(f"size_{bits or 16}bit_bytes", run.metrics.get("size_bytes")) for run in runs]
    return {"size_gb": _mean(_over(size, 1e9) for size in sizes), "inference_s": _mean(seconds)}


def _grouped(runs: Iterable[Tracked], key: Callable[[Tracked], Any]) -> list[tuple[Any, list[Tracked]]]:
    groups: dict[Any, list[Tracked]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return list(groups.items())


def _best(runs: list[Tracked], quality: Callable[[Tracked], float]) -> tuple[tuple[Tracked, ...], int]:
    """The runs, the newest of each seed, of the best settings; and how many settings there are."""
    settings = [
        tuple({run.setting("train.seed"): run for run in sorted(of_one, key=lambda run: run.start_ms)}.values())
        for _, of_one in _grouped(runs, lambda run: run.meaning)
    ]
    return max(settings, key=lambda of_one: statistics.fmean(quality(run) for run in of_one)), len(settings)


def _largest_first(groups: list[Group]) -> list[Group]:
    """Those that compare most first, of equal ones that with more training."""
    return sorted(groups, key=lambda group: (-len(group.rows), -group.scale.amount))


def _figure(runs: Iterable[Tracked], name: str) -> Value | None:
    return _mean(run.metrics.get(name) for run in runs)


def _mean(values: Iterable[float | None]) -> Value | None:
    """Over those that were measured; the spread of two and more."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Value(statistics.fmean(known), max(known) - min(known) if len(known) > 1 else None)


def _one(value: float | None) -> Value | None:
    return None if value is None else Value(float(value))


def _over(value: float | None, divisor: float | None) -> float | None:
    return value / divisor if value is not None and divisor else None
