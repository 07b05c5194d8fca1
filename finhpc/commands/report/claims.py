"""Which of the paper's claims hold at the scale that was measured: its figure, ours, and the verdict.

A claim holds if our figure is at least the paper's as printed, holds in part if ours points the same way but is
smaller, and does not hold if it points the other way. A claim without a run or a figure is not measured. Time and
memory of runs with different placements, and times of very short trainings, are not comparable.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from finhpc.commands.report.curves import mean_curve, steps_to
from finhpc.commands.report.paper import INFERENCE_SPEEDUP, TUNED_FINANCIAL, TUNED_GENERAL, TUNED_MEMORY, paper_tables
from finhpc.commands.report.runs import FINANCIAL, GENERAL, Collected
from finhpc.commands.report.tables import Group, Row, Table, inference

Verdict = Literal["holds", "in part", "does not hold", "not comparable", "not measured"]
LEAST_TRAINING_S = 60.0  # of steps; below, times measure starting up rather than training
PLACES = {"stages": "stages", "replicas": "replicas", "device": "device", "threads": "threads per worker"}
ABSTRACT = "Llama2-13B-r16"  # the model of the abstract's figures
NAMES = {
    "boolq": "BoolQ",
    "piqa": "PIQA",
    "winogrande": "WinoGrande",
    "fpb": "FPB",
    "fiqa_sa": "FiQA SA",
    "tfns": "TFNS",
}
TUNED_ORDER = ((16, 16), (8, 16), (8, 8), (8, 4), (4, 16))  # the abstract's first


@dataclass(frozen=True)
class Claim:
    """`at`: our model and the paper's; `paper`, `ours`: the figures as text; `how`: what was compared."""

    claim: str
    at: str
    paper: str
    ours: str
    verdict: Verdict
    how: str


def make_claims(found: Collected, tables: dict[str, Table]) -> list[Claim]:
    """Every claim, at the scale with most rows."""
    return [
        *_method_1(tables["vi"].groups[0] if tables["vi"].groups else None),
        *_method_2(found, tables),
        *_finetuning(tables["viii"].groups, tables["ix"].groups),
    ]


def verdict(ours: float | None, paper: float, neutral: float) -> Verdict:
    """The verdict on a figure for which larger is better. `neutral`: 1 for ratios, 0 for differences."""
    if ours is None:
        return "not measured"
    if ours >= paper:
        return "holds"
    return "in part" if ours > neutral else "does not hold"


# -- pretraining ----------------------------------------------------------------------------


def _method_1(group: Group | None) -> Iterator[Claim]:
    """Compression, speed and quality of method 1 compared with dense, at every rank that the paper has too."""
    dense = group.find("dense") if group else None
    pairs = [row for row in group.rows if row.kind == "low_rank" and row.paper] if group else []
    if dense is None or not pairs:
        yield Claim(
            "Fewer parameters, faster training, no loss of accuracy (method 1)",
            "-",
            "1.64 x, 1.14 x (r = n/4)",
            "-",
            "not measured",
            "needs a dense and a low-rank run of one scale, at a rank of the paper",
        )
        return
    of_rows = [list(_against_dense(dense, row)) for row in pairs]
    for same_claim in zip(*of_rows, strict=True):
        yield from same_claim


def _against_dense(dense: Row, row: Row) -> Iterator[Claim]:
    assert row.paper is not None
    at, paper_time = _at(row), _paper_ratio(dense, row, "worker_hours")
    params = _quotient(dense, row, "params_total"), _paper_ratio(dense, row, "params_total")
    yield _ratio("Fewer parameters", at, *params, "parameters, dense over low-rank")
    how = "worker-hours of the whole command, dense over low-rank"
    apart = unlike(dense, row, time=True, start_up=True)
    yield _ratio("Less training time", at, _quotient(dense, row, "worker_hours"), paper_time, how, apart)
    how = "median tokens/s, low-rank over dense; the paper's: of the whole training"
    apart = unlike(dense, row, time=True)
    yield _ratio("Faster training steps", at, _quotient(row, dense, "tokens_per_s"), paper_time, how, apart)
    how = "peak memory of all workers, dense over low-rank"
    memory = _quotient(dense, row, "memory_gb"), _paper_ratio(dense, row, "memory_gb")
    yield _ratio("Less training memory", at, *memory, how, unlike(dense, row))
    base, own = (inference(one.runs, 16)["inference_s"] for one in (dense, row))
    ours = base.mean / own.mean if base and own else None
    how = "seconds per generated token, dense over low-rank"
    yield _ratio("Faster inference", at, ours, INFERENCE_SPEEDUP[row.paper.model.name], how)
    yield _no_drop(dense, row)


def _ratio(name: str, at: str, ours: float | None, paper: float, how: str, apart: str = "") -> Claim:
    """A claim about a ratio. `apart`: why the two rows are not comparable, if they are not."""
    if ours is not None and apart:
        return Claim(name, at, _x(paper), apart, "not comparable", how)
    # Compared with the digits that are shown.
    outcome = verdict(None if ours is None else round(ours, 2), round(paper, 2), 1)
    return Claim(name, at, _x(paper), _x(ours), outcome, how)


def unlike(one: Row, other: Row, time: bool = False, start_up: bool = False) -> str:
    """Why the memory of two rows, or their `time`, is not comparable; empty if it is.

    `start_up`: the time includes starting up, for which the trials of a sweep reuse processes.
    """
    reasons = []
    for key, name in PLACES.items():
        values = [_joined(run.place(key) for run in row.runs) for row in (one, other)]
        if values[0] != values[1]:
            reasons.append(f"{name} {values[0]} and {values[1]}")
    if start_up:
        warm = [_joined(("warm" if run.warm else "cold") for run in row.runs) for row in (one, other)]
        if warm[0] != warm[1]:
            reasons.append(f"{warm[0]} and {warm[1]} starts")
    if time:
        spans = [run.train_s for row in (one, other) for run in row.runs]
        known = [span for span in spans if span is not None]
        if len(known) < len(spans):
            reasons.append("length of a training unknown")
        elif min(known) < LEAST_TRAINING_S:
            reasons.append(f"only {min(known):,.0f} s of steps, below {LEAST_TRAINING_S:.0f}")
    return "; ".join(reasons)


def _joined(values: Iterable[str | None]) -> str:
    return "/".join(sorted({value or "unknown" for value in values}))


def _no_drop(dense: Row, row: Row) -> Claim:
    """The scores, if there are any, and the validation loss."""
    shared = [task for task in GENERAL if dense.values[task] and row.values[task]]
    of_paper = ""
    if dense.paper and row.paper:
        changes = [row.paper.values[task] - dense.paper.values[task] for task in GENERAL]
        of_paper = " / ".join(f"{change:+.1f}" for change in changes) + " points"
    loss, base = row.values["val_loss"], dense.values["val_loss"]
    changes_of_ours, good = [], []
    for task in shared:
        change = _mean_of(row, task) - _mean_of(dense, task)
        changes_of_ours.append(f"{NAMES[task]} {change:+.1f}")
        good.append(change >= 0)
    if loss and base:
        changes_of_ours.append(f"validation loss {loss.mean - base.mean:+.3f}")
        good.append(loss.mean <= base.mean)
    outcome: Verdict = (
        "not measured" if not good else "holds" if all(good) else "in part" if any(good) else "does not hold"
    )
    return Claim(
        "No loss of quality",
        _at(row),
        of_paper,
        ", ".join(changes_of_ours) or "-",
        outcome,
        "BoolQ, PIQA, WinoGrande and validation loss, low-rank minus dense; holds if no measured figure is worse",
    )


def _method_2(found: Collected, tables: dict[str, Table]) -> Iterator[Claim]:
    """Figure 6: method 2 ends with a lower loss than method 1, and reaches method 1's sooner."""
    ends, sooner = "Method 2 ends with a lower loss than method 1", "Method 2 converges faster than method 1"
    both = []
    for group in tables["vii"].groups:
        other = next((g for g in tables["vi"].groups if g.scale == group.scale), None)
        both += [
            (one, two)
            for two in group.rows
            if two.kind == "svd" and other
            for one in other.rows
            if one.kind == "low_rank" and one.rank == two.rank
        ]
        if both:
            break
    if not both:
        needs = "needs methods 1 and 2 at one scale and rank"
        yield Claim(ends, "-", "yes (figure 6)", "-", "not measured", needs)
        yield Claim(sooner, "-", "yes (figure 6)", "-", "not measured", needs)
        return
    curves = [[mean_curve(found.curves(row.runs, "val_loss")) for row in pair] for pair in both]
    pairs = [(one, first, second) for (one, _), (first, second) in zip(both, curves, strict=True) if first and second]
    for row, first, second in pairs:
        last_1, last_2 = first[max(first)], second[max(second)]
        outcome: Verdict = "holds" if last_2 < last_1 else "does not hold"
        how = "final validation loss; the initial model's own training is not counted"
        yield Claim(ends, _at(row), "yes (figure 6)", f"{last_2:.3f} against {last_1:.3f}", outcome, how)
    for row, first, second in pairs:
        steps, reached = max(first), steps_to(second, first[max(first)])
        outcome = "holds" if reached is not None and reached < steps else "does not hold"
        when = "never" if reached is None else f"after {reached / steps:.0%} of the steps"
        how = f"method 2's steps until it reaches method 1's final loss, of {steps:,}"
        yield Claim(sooner, _at(row), "yes (figure 6)", when, outcome, how)


# -- finetuning -----------------------------------------------------------------------------


def _finetuning(scores: list[Group], costs: list[Group]) -> Iterator[Claim]:
    group, cost = (groups[0] if groups else None for groups in (scores, costs))
    base = group.find("base") if group else None
    for name, tasks, paper in (("general", GENERAL, TUNED_GENERAL), ("financial", FINANCIAL, TUNED_FINANCIAL)):
        claim = f"Finetuning raises the average of the {name} tasks"
        of_paper = f"{paper:+.1f} points"
        row, shared = _tuned_pair(group, base, tasks)
        if row is None or base is None:
            yield Claim(
                claim, ABSTRACT, of_paper, "-", "not measured", "needs scores of the base and of an adapter over it"
            )
            continue
        change = sum(_mean_of(row, task) - _mean_of(base, task) for task in shared) / len(shared)
        yield Claim(
            claim,
            f"{row.label} / {ABSTRACT}",
            of_paper,
            f"{change:+.1f} points",
            verdict(change, paper, 0),
            f"the adapter minus its base, mean of {', '.join(NAMES[task] for task in shared)}",
        )
    for bits in (8, 4):
        yield _bits_ratio(cost, bits, "memory_gb", "Finetuning memory")
        yield _bits_ratio(cost, bits, "size_gb", "Model size")
    yield Claim(
        "Finetuning memory, all weights over LoRA",
        ABSTRACT,
        f"{TUNED_MEMORY:.2f} x",
        "-",
        "not measured",
        "finhpc only finetunes adapters",
    )


def _tuned_pair(group: Group | None, base: Row | None, tasks: tuple[str, ...]) -> tuple[Row | None, list[str]]:
    """The adapter to compare, preferably the abstract's, and the tasks that it and its base were both scored on."""
    if group is None or base is None:
        return None, []
    ordered = [row for rank, bits in TUNED_ORDER if (row := group.find("lora", rank, bits))]
    for row in [*ordered, *(row for row in group.rows if row.kind == "lora")]:
        if shared := [task for task in tasks if base.values[task] and row.values[task]]:
            return row, shared
    return None, []


def _bits_ratio(group: Group | None, bits: int, key: str, name: str) -> Claim:
    """16 bits over fewer at one LoRA rank; the paper's rank is 8."""
    rows = [row for row in group.rows if row.kind == "lora" and row.bits == bits] if group else []
    pairs = [(full, row) for row in rows if group and (full := group.find("lora", row.rank, 16))]
    table = paper_tables()["ix"]
    model = pairs[0][1].paper.model if pairs and pairs[0][1].paper else table.rows[0].model
    of_paper = {row.bits: row.values[key] for row in table.rows if row.model == model and row.rank == 8}
    paper = of_paper[16] / of_paper[bits]
    ours = _quotient(*pairs[0], key) if pairs else None
    apart = unlike(*pairs[0]) if pairs and key == "memory_gb" else ""
    at = f"{pairs[0][1].label} / {model.name}-r8" if pairs else f"{model.name}-r8"
    how = "adapters of one rank, their bases at 16 bits over fewer"
    return _ratio(f"{name}, 16 bits over {bits}", at, ours, paper, how, apart)


# -- figures --------------------------------------------------------------------------------


def _quotient(over: Row, under: Row, key: str) -> float | None:
    a, b = over.values.get(key), under.values.get(key)
    return a.mean / b.mean if a and b and b.mean else None


def _paper_ratio(dense: Row, row: Row, key: str) -> float:
    assert dense.paper is not None
    assert row.paper is not None
    return dense.paper.values[key] / row.paper.values[key]


def _mean_of(row: Row, key: str) -> float:
    value = row.values[key]
    assert value is not None
    return value.mean


def _at(row: Row) -> str:
    """Our rank and the paper's row; the widths differ."""
    return f"r{row.rank} / {row.paper.label}" if row.paper else f"r{row.rank}"


def _x(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} x"
