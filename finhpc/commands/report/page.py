"""Pages of results as one HTML file each, with their style and figures inside, and the report (`page.html.j2`)."""

from __future__ import annotations

from collections import Counter
from importlib.resources import files
from itertools import groupby
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined

from finhpc.commands.report.cells import COLUMNS, MISSING, Form, spread
from finhpc.commands.report.claims import Claim
from finhpc.commands.report.figures import Figure
from finhpc.commands.report.paper import PaperRow
from finhpc.commands.report.runs import Collected
from finhpc.commands.report.tables import Group, Table

VERDICTS = ("holds", "in part", "does not hold", "not comparable", "not measured")


def render(package: str, template: str, figures: list[Figure], **values: Any) -> str:
    """Return the page of a template in a package, which extends `layout.html.j2`: the style, and the figures last."""
    here = files("finhpc.commands.report")
    templates = {"layout.html.j2": here / "layout.html.j2", template: files(package) / template}
    environment = Environment(
        loader=DictLoader({name: path.read_text(encoding="utf-8") for name, path in templates.items()}),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    style = (here / "page.css").read_text(encoding="utf-8")
    return environment.get_template(template).render(style=style, figures=figures, **values)


def page_of(
    found: Collected, tables: dict[str, Table], claims: list[Claim], figures: list[Figure], about: dict[str, Any]
) -> str:
    """The page of the report. `about`: tracking_uri, experiments, made (when) and version."""
    first = [group for table in tables.values() for group in table.groups[:1]]
    verdicts = Counter[str](claim.verdict for claim in claims)
    return render(
        "finhpc.commands.report",
        "page.html.j2",
        figures,
        found=found,
        about=about,
        scales=list(dict.fromkeys(f"{group.scale.text}; {_machine(group)}; {_seeds(group)}" for group in first)),
        claims=[list(same) for _, same in groupby(claims, lambda claim: (claim.claim, claim.how))],
        tally={name: verdicts[name] for name in VERDICTS},
        tables=list(tables.values()),
        all_columns=COLUMNS,
        missing=MISSING,
        headings=lambda columns: Counter(column.over for column in columns if column.over),
        machine=_machine,
        examples=_examples,
        spread=spread,
        printed=_printed,
    )


def _seeds(group: Group) -> str:
    """The number of seeds of the rows, and a warning if it is one."""
    counts = sorted({row.train_seeds for row in group.rows if row.train_seeds})
    if counts in ([], [1]):
        return "one seed, so small differences may be chance"
    return f"{_range(counts)} seeds"


def _range(counts: list[int]) -> str:
    return " to ".join(f"{count:,}" for count in dict.fromkeys((counts[0], counts[-1])))


def _machine(group: Group) -> str:
    """The workers, device and threads of the group's runs, as far as MLflow has them."""
    machines: list[str] = []
    for run in [run for row in group.rows for run in row.runs]:
        workers, threads, device = (run.start(key) for key in ("workers", "threads", "device"))
        parts = [f"{workers} worker{'' if workers == '1' else 's'}"] if workers else []
        parts += [f"on {device.upper() if device == 'cpu' else device}"] if device else []
        parts += [f"{threads} thread{'' if threads == '1' else 's'} each"] if threads and device == "cpu" else []
        machines.append(", ".join(parts) or "machine not recorded")
    return " / ".join(dict.fromkeys(machines)) or "no run of ours"


def _examples(table: Table) -> str:
    """The examples of each task that the first rows were scored on, with the score of the most frequent label."""
    runs = [run for group in table.groups[:1] for row in group.rows for run in row.runs]
    tasks = []
    for column in COLUMNS[table.key]:
        counts = sorted({int(count) for run in runs if (count := run.figure(column.key, "examples")) is not None})
        if not counts:
            continue
        majority = {value for run in runs if (value := run.score(column.key, "_majority")) is not None}
        ends = [(run.score(column.key, "_ci95_low"), run.score(column.key, "_ci95_high")) for run in runs]
        halves = [(high - low) / 2 for low, high in ends if low is not None and high is not None]
        details = [f"most frequent label {max(majority):.1f}"] if majority else []
        details += [f"95 % interval ±{max(halves):.1f}"] if halves else []
        tasks.append(f"{column.title} {_range(counts)}" + (f" ({', '.join(details)})" if details else ""))
    return f" Examples scored: {'; '.join(tasks)}." if tasks else ""


def _printed(row: PaperRow, key: str, form: Form) -> str:
    """A figure of the paper as it prints it, with thousands separated."""
    if key not in row.values:
        return MISSING
    text = row.printed[key]
    return form(row.values[key]) if "e" in text else text if "." in text else f"{int(text):,}"
