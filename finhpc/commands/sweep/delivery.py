"""What MLflow missed of a sweep's trials, sent once more: a server may have been away when they ended."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from finhpc.commands.sweep.plan import Planned
from finhpc.commands.sweep.tracking import track_score
from finhpc.commands.sweep.trial import job_of, outcome_of, write_outcome
from finhpc.errors import FinhpcError
from finhpc.runs.folder import RunFolder
from finhpc.runs.run import tell_mlflow
from finhpc.tracking.tracker import Status

log = logging.getLogger(__name__)

HOW: dict[str, Status] = {"finished": "FINISHED", "pruned": "KILLED"}  # else FAILED


def deliver(plan: Planned, parent: str | None) -> None:
    """Send what is left of every trial that ended, and write the ids of its MLflow runs to its outcome.

    Waits for a server that does not answer as long as the end of one run does, then leaves all the rest: the same
    command sends it again. A trial that cannot be opened any more takes no other down.
    """
    for trial in plan.trials:
        run = plan.run_folder(trial.name)
        if "status" not in outcome_of(run) or not _missed(run):
            continue
        log.info(f"sending to MLflow what it missed of trial {trial.name}")
        try:
            _send(run, plan.told(trial, parent))
        except FinhpcError as error:  # its data or its base is gone
            log.info(f"trial {trial.name} was not sent: {error}")
            continue
        if _missed(run):
            log.info("MLflow does not answer; the same command sends the rest.")
            return


def _send(run: Path, told: dict[str, Any]) -> None:
    found, job, folder = outcome_of(run), job_of(told), RunFolder(str(run.parent), run.name)
    if _unsent(run):
        sent = tell_mlflow(job, folder, HOW.get(found["status"], "FAILED"))
        found |= {"mlflow_run_id": sent["mlflow_run_id"]}
    for name, score in found.get("scored", {}).items():
        if _unsent(run / f"score-{told['scores'][name]}bit"):
            score["mlflow_run_id"] = track_score(job, folder, name, told["scores"][name], _without_id(score))
    write_outcome(run, found)


def _missed(run: Path) -> bool:
    return any(_unsent(path.parent) for path in (run / "mlflow.json", *run.glob("score-*bit/mlflow.json")))


def _unsent(folder: Path) -> bool:
    """Whether a folder has an MLflow run that was never told how it ended."""
    path = folder / "mlflow.json"
    return path.is_file() and json.loads(path.read_text(encoding="utf-8"))["ended"] is None


def _without_id(score: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in score.items() if key != "mlflow_run_id"}
