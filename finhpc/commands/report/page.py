"""The report as one HTML page that needs nothing else: its style and its figures are in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from itertools import groupby
from typing import Any

from finhpc.commands.report.cells import COLUMNS, MISSING, Column, Form, spread
from finhpc.commands.report.claims import Claim
from finhpc.commands.report.figures import Figure
from finhpc.commands.report.paper import PaperRow
from finhpc.commands.report.runs import Collected
from finhpc.commands.report.tables import Group, Row, Table

OPEN_GROUPS = 2  # scales shown at once; the others are folded
VERDICTS = ("holds", "in part", "does not hold", "not comparable", "not measured")
CLAIM_WIDTHS = (21, 18, 15, 17, 10, 19)  # of the columns, in percent
PAPER = "X.-Y. Liu, J. Zhang, G. Wang, W. Tong, A. Walid, FinGPT-HPC"
NOTES = {
    "vi": "Scores: accuracy in percent. Model size: at 8 bits, as the paper counts it. Memory: the peaks of all "
    "workers together; on GPUs of the allocator, on CPUs of live tensors. Time: workers x running time of the command.",
    "vii": "As above. Time is that of method 2's own training, as in the paper; with start: the training of the dense "
    "model it starts from counted too, where MLflow knows it.",
    "viii": "BoolQ, PIQA, WinoGrande: accuracy; FPB, FiQA SA, TFNS: weighted F1; in percent. Held-out F1: of "
    "the finetuning's own held-out labels. The paper's base is Llama 2 whatever ours is.",
    "ix": "#Params: trained ones; of the base, all. Time (seconds): of a generated token, ours; the paper does not say "
    "of what. It prints 6.7 B for Llama2-13B too.",
}


def page_of(
    found: Collected, tables: dict[str, Table], claims: list[Claim], figures: list[Figure], about: dict[str, Any]
) -> str:
    """The page. `about`: tracking_uri, experiments, made (when) and version."""
    style = (files("finhpc.commands.report") / "page.css").read_text(encoding="utf-8")
    sections = [("claims", "Which of the paper's claims hold at this scale", _claims(claims))]
    sections += [(f"table-{key}", f"Table {key.upper()}", _table(table)) for key, table in tables.items()]
    sections += [(figure.key, figure.title, _drawn(figure)) for figure in figures]
    links = "".join(f'<a href="#{key}">{escape(_short(title))}</a>' for key, title, _ in sections)
    body = "".join(
        f'<section id="{key}"><h2>{_heading(key, title, tables)}</h2>{content}</section>'
        for key, title, content in sections
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>FinGPT-HPC, measured</title>\n'
        f"<style>\n{style}</style></head>\n<body>\n{_head(found, tables, about)}<nav>{links}</nav>\n{body}\n"
        f"{_foot(found, about)}</body></html>\n"
    )


def _short(title: str) -> str:
    return title.partition(":")[0].replace("Which of the paper's claims hold at this scale", "Claims")


def _heading(key: str, title: str, tables: dict[str, Table]) -> str:
    if table := tables.get(key.removeprefix("table-")):
        return f"{escape(title)}<small>{escape(table.title)}</small>"
    return escape(title)


def _head(found: Collected, tables: dict[str, Table], about: dict[str, Any]) -> str:
    first = [group for table in tables.values() for group in table.groups[:1]]
    scales = dict.fromkeys(f"{group.scale.text}; {_machine(group)}; {_seeds(group)}" for group in first)
    listed = "".join(f"<li>{escape(text)}</li>" for text in scales)
    measured = (
        f"<p class='lead'>Ours were measured at this scale, the paper's on eight A100s at its own:</p><ul>{listed}</ul>"
    )
    return (
        f"<h1>FinGPT-HPC: the paper's tables, and what finhpc measured</h1>"
        f"<p class='lead'>From {len(found.pretrained)} pretrained and {len(found.finetuned)} finetuned models "
        f"tracked in {escape(about['tracking_uri'])} ({escape(', '.join(about['experiments']))}), "
        f"{escape(about['made'])}.</p>"
        f"{measured if scales else ''}"
        f"<p>Models, data, training and machines differ: compare ratios within ours with ratios within the paper's.</p>"
    )


def _seeds(group: Group) -> str:
    """How many seeds the rows are of; one says nothing of chance."""
    counts = sorted({row.train_seeds for row in group.rows if row.train_seeds})
    if counts in ([], [1]):
        return "one seed, so small differences may be chance"
    return f"{' to '.join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))} seeds"


def _machine(group: Group) -> str:
    """On what the group's runs ran, as far as MLflow knows: workers, device, threads."""
    said: list[str] = []
    for run in [run for row in group.rows for run in row.runs]:
        workers, threads = (run.start(key) for key in ("workers", "threads"))
        device = run.start("device")
        parts = [f"{workers} worker{'' if workers == '1' else 's'}"] if workers else []
        parts += [f"on {device.upper() if device == 'cpu' else device}"] if device else []
        parts += [f"{threads} thread{'' if threads == '1' else 's'} each"] if threads and device == "cpu" else []
        said.append(", ".join(parts) or "machine not recorded")
    return " / ".join(dict.fromkeys(said)) or "no run of ours"


# -- claims ---------------------------------------------------------------------------------


def _claims(claims: Sequence[Claim]) -> str:
    tally = Counter[str](claim.verdict for claim in claims)
    counted = "".join(f'<div><b class="{_class(name)}">{tally[name]}</b><span>{name}</span></div>' for name in VERDICTS)
    rows = "".join(_claim_rows(list(same)) for _, same in groupby(claims, lambda claim: (claim.claim, claim.how)))
    widths = "".join(f"<col style='width: {share}%'>" for share in CLAIM_WIDTHS)
    return (
        f"<p>A claim holds where ours is at least the paper's figure, in part where it points the same way with less, "
        f"and does not hold where it points the other way. Time and memory "
        f"are compared only between runs that were placed alike and trained long enough.</p>"
        f"<div class='tally'>{counted}</div>"
        f"<div class='scroll'><table class='words'><colgroup>{widths}</colgroup><thead><tr><th>claim</th>"
        f"<th>ours / paper's</th><th>paper</th><th>ours</th><th></th>"
        f"<th>compared</th></tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _claim_rows(same: list[Claim]) -> str:
    """One claim at several ranks, named once."""
    rows = []
    for i, claim in enumerate(same):
        first, last = "", ""
        if i == 0:
            first = f"<td rowspan={len(same)}>{escape(claim.claim)}</td>"
            last = f"<td class='how' rowspan={len(same)}>{escape(claim.how)}</td>"
        rows.append(
            f"<tr{' class=again' if i else ''}>{first}<td>{escape(claim.at)}</td><td>{escape(claim.paper)}</td>"
            f"<td>{escape(claim.ours)}</td>"
            f"<td><span class='verdict {_class(claim.verdict)}'>{claim.verdict}</span></td>{last}</tr>"
        )
    return "".join(rows)


def _class(verdict: str) -> str:
    return verdict.replace(" ", "-")


# -- tables ---------------------------------------------------------------------------------


def _table(table: Table) -> str:
    columns = COLUMNS[table.key]
    shown, folded = table.groups[:OPEN_GROUPS], table.groups[OPEN_GROUPS:]
    parts = [_scaled(table.key, columns, shown, [] if folded else table.others)]
    if not shown:
        parts.insert(0, "<p>No run of ours belongs here yet; these are the paper's.</p>")
    if folded:
        more = _scaled(table.key, columns, folded, table.others)
        parts.append(
            f"<details><summary>{len(folded)} other scales, and the paper's other rows</summary>{more}</details>"
        )
    several = any(
        row.values.get(key) and row.values[key].spread is not None  # type: ignore[union-attr]
        for group in table.groups
        for row in group.rows
        for key in row.values
    )
    seeds = " &plusmn;: half of what the seeds spread over." if several else ""
    note = f"{escape(NOTES[table.key])}{escape(_examples(table))}{seeds} {MISSING}: not measured."
    return "".join(parts) + f"<p class='note'>{note}</p>"


def _examples(table: Table) -> str:
    """On how many examples of each task the rows shown first were scored, what always giving its most frequent label
    scores on them, and how much of a score is chance: few examples leave much to it.
    """
    runs = [run for group in table.groups[:1] for row in group.rows for run in row.runs]
    said = []
    for column in COLUMNS[table.key]:
        counts = sorted({int(count) for run in runs if (count := run.figure(column.key, "examples")) is not None})
        if not counts:
            continue
        text = f"{column.title} {' to '.join(f'{n:,}' for n in dict.fromkeys((counts[0], counts[-1])))}"
        majority = {value for run in runs if (value := run.score(column.key, "_majority")) is not None}
        ends = [(run.score(column.key, "_ci95_low"), run.score(column.key, "_ci95_high")) for run in runs]
        halves = [(high - low) / 2 for low, high in ends if low is not None and high is not None]
        beside = [f"most frequent label {max(majority):.1f}"] if majority else []
        beside += [f"95 % interval ±{max(halves):.1f}"] if halves else []
        said.append(f"{text} ({', '.join(beside)})" if beside else text)
    return f" Examples scored: {'; '.join(said)}." if said else ""


def _scaled(key: str, columns: list[Column], groups: list[Group], others: list[PaperRow]) -> str:
    width = len(columns) + 1
    rows = []
    for group in groups:
        scale = group.scale
        data = f", data {scale.data}" if scale.data else ""
        rows.append(
            f"<tr class='scale'><td colspan={width}>{escape(f'{scale.model} ({scale.size})')} "
            f"<span>{escape(f'{scale.amount:,} {scale.unit}{data}')}; {escape(_machine(group))}</span></td></tr>"
        )
        rows += [_ours(row, columns) + (_paper(row.paper, columns) if row.paper else "") for row in group.rows]
    if others:
        rows.append(f"<tr class='scale'><td colspan={width}>The paper's {'other ' if groups else ''}rows</td></tr>")
        rows += [_paper(row, columns) for row in others]
    return f"<div class='scroll'><table>{_headings(columns)}<tbody>{''.join(rows)}</tbody></table></div>"


def _headings(columns: list[Column]) -> str:
    names = "".join(f"<th{_own(column)}>{escape(column.title)}</th>" for column in columns)
    first = "<th>Model &amp; Method</th>"
    if not any(column.over for column in columns):
        return f"<thead><tr>{first}{names}</tr></thead>"
    over = "".join(
        f"<th class='over' colspan={sum(c.over == name for c in columns)}>{escape(name)}</th>"
        for name in dict.fromkeys(column.over for column in columns)
    )
    return f"<thead><tr><th class='none'></th>{over}</tr><tr>{first}{names}</tr></thead>"


def _ours(row: Row, columns: list[Column]) -> str:
    notes = [row.remark] if row.remark else []
    notes += [f"{row.train_seeds} seeds"] if row.train_seeds > 1 else []
    notes += [f"best of {row.settings} settings"] if row.settings > 1 else []
    name = escape(row.label) + (f" <small>{escape(', '.join(notes))}</small>" if notes else "")
    cells = []
    for column in columns:
        text = _figure(row, column.key, column.form)
        if column.second:
            text += f" ({_figure(row, *column.second)})"
        cells.append(f"<td{_own(column)}>{text}</td>")
    return f"<tr class='ours'><td>{name}</td>{''.join(cells)}</tr>"


def _figure(row: Row, key: str, form: Form) -> str:
    value = row.values.get(key)
    if value is None:
        return MISSING
    beside = spread(value, form)
    return escape(form(value.mean)) + (f" <small>&plusmn;{escape(beside)}</small>" if beside else "")


def _paper(row: PaperRow, columns: list[Column]) -> str:
    def told(key: str, form: Form) -> str:
        if key not in row.values:
            return MISSING
        text = row.printed[key]
        return escape(form(row.values[key]) if "e" in text else text if "." in text else f"{int(text):,}")

    cells = []
    for column in columns:
        second = f" ({told(*column.second)})" if column.second else ""
        text = "" if column.own else told(column.key, column.form) + second
        cells.append(f"<td{_own(column)}>{text}</td>")
    return f"<tr class='paper'><td>paper: {escape(row.label)}</td>{''.join(cells)}</tr>"


def _own(column: Column) -> str:
    return " class='own'" if column.own else ""


# -- figures and the end --------------------------------------------------------------------


def _drawn(figure: Figure) -> str:
    narrow = "" if figure.panels > 1 else " class='narrow'"
    return f"<figure{narrow}>{figure.svg}<figcaption>{escape(figure.caption)}</figcaption></figure>"


def _foot(found: Collected, about: dict[str, Any]) -> str:
    left = "; ".join(f"{number} {why}" for why, number in found.left_out.items())
    return (
        f"<p class='note'>{f'Left out: {escape(left)}. ' if left else ''}The paper's figures: {escape(PAPER)}, Tables "
        f"VI to IX. Columns behind the line are not in its tables. Made by finhpc {escape(about['version'])}.</p>"
    )
