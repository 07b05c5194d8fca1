"""`finhpc report`: the paper's tables and figures from the runs in MLflow, as a page, CSV and PNG."""

from __future__ import annotations

import logging
import os
import shlex
import time
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import finhpc
from finhpc.commands.report.cells import rows_of
from finhpc.commands.report.claims import make_claims
from finhpc.commands.report.figures import make_figures
from finhpc.commands.report.page import page_of
from finhpc.commands.report.runs import Collected, collect
from finhpc.commands.report.store import all_runs, chosen_experiments, open_store, reading
from finhpc.commands.report.tables import make_tables
from finhpc.errors import ConfigError
from finhpc.files import redact, write_atomic, write_csv, write_json
from finhpc.settings.report import ReportConfig

log = logging.getLogger(__name__)


def report(config: ReportConfig, dry_run: bool = False) -> dict[str, Any]:
    """Write the page, a CSV per table, a PNG per figure and `result.json` into `config.out`; return the result.

    Everything comes from MLflow. `dry_run` reads and counts, and writes nothing. Raises `ConfigError` for an address
    without a store, an experiment that does not exist or has no finished run, or an `out` that is not a folder, and
    `FinhpcError` for a server that does not answer.
    """
    began = time.perf_counter()
    run = config.run
    uri = run.mlflow_uri
    if not config.out:
        raise ConfigError("out is not set; give a folder for the report.")
    out = Path(os.path.abspath(Path(config.out).expanduser()))
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out={config.out} is a file; give a folder for the report.")
    client = open_store(uri)
    with reading(uri):
        experiments = chosen_experiments(client, config.experiments)
        found = collect(client, all_runs(client, experiments))
        _check_found(found, uri, [experiment.name for experiment in experiments])
        used = [experiment.name for experiment in experiments if experiment.experiment_id in found.experiments]
        tables = make_tables(found)
        claims = make_claims(found, tables)
        figures = [] if dry_run else make_figures(found, tables)
    result: dict[str, Any] = {
        "status": "dry_run" if dry_run else "finished",
        "out": str(out),
        "tracking_uri": redact(uri),
        "experiments": used,
        "runs": {"pretrained": len(found.pretrained), "finetuned": len(found.finetuned), "scored": len(found.scored)},
        "left_out": dict(found.left_out),
        "claims": [asdict(claim) for claim in claims],
        "tables": {key: rows_of(table) for key, table in tables.items()},
        "files": [],
        "wall_s": None,
    }
    if dry_run:
        return result
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out={out} cannot be made ({error.strerror}); choose a folder you may write to.") from None
    files = [out / f"table-{key}.csv" for key in tables]
    for path, table in zip(files, tables.values(), strict=True):
        write_csv(path, rows_of(table))
    for figure in figures:
        path = out / f"{figure.key}.png"
        path.write_bytes(figure.png)
        files.append(path)
    about = {"tracking_uri": redact(uri), "experiments": used, "version": finhpc.__version__}
    about["made"] = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    page = out / "report.html"
    write_atomic(page, page_of(found, tables, claims, figures, about))
    result["files"] = [str(path) for path in (page, *files, out / "result.json")]
    result["wall_s"] = time.perf_counter() - began
    write_json(out / "result.json", result, indent=2)
    log.info(
        f"open {shlex.quote(str(page))} in a browser; its tables (CSV) and figures (PNG) are in the same folder.",
    )
    return result


def _check_found(found: Collected, uri: str, names: list[str]) -> None:
    if found.pretrained or found.finetuned:
        return
    why = "; ".join(f"{number} {reason}" for reason, number in found.left_out.items())
    raise ConfigError(
        f"{redact(uri)} has no finished run of pretrain or finetune in {', '.join(names)}"
        f"{f' ({why})' if why else ''}; train something first, or give the --run.storage and --experiments that runs "
        "went to."
    )
