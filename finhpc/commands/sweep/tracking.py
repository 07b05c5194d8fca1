"""A sweep in MLflow: one parent run, its trials nested below, their scores, the best model in the registry."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from finhpc.commands.sweep.trial import TrialArguments, read_outcome, read_record, write_outcome
from finhpc.errors import FinhpcError
from finhpc.runs.folder import RunFolder
from finhpc.runs.job import Job
from finhpc.runs.run import send_to_mlflow
from finhpc.tracking.describe import Description
from finhpc.tracking.registry import register, settle_children
from finhpc.tracking.store import RefusedError
from finhpc.tracking.tags import COMMAND, PREFIX, SCORED_FROM, SETTING, setting_tags
from finhpc.tracking.tracker import Status, Tracker

if TYPE_CHECKING:
    from finhpc.commands.sweep.plan import SweepPlan

log = logging.getLogger(__name__)

T = TypeVar("T")

WAIT_S = 20.0  # for MLflow to give the parent its id, before the trials start
STATUS: dict[str, Status] = {"finished": "FINISHED", "pruned": "KILLED"}  # of a trial's run, else FAILED


class Parent:
    """The sweep's own MLflow run, as a context."""

    def __init__(self, plan: SweepPlan, folder: RunFolder) -> None:
        config = plan.config
        self.plan = plan
        commit = folder.write_environment()["git_commit"]
        tags = setting_tags(config) | plan.tags | {COMMAND: "sweep", "mlflow.source.name": "finhpc sweep"}
        tags |= {"mlflow.source.git.commit": commit} if commit else {}
        uri, run, params = plan.tracking_uri, config.run, plan.shared_parameters()
        self.tracker = Tracker(Description(folder.path, uri, run.experiment, run.name, params, tags, plan.datasets))
        self.ended = False

    @property
    def id(self) -> str | None:
        """None until MLflow has answered; the children of a run without an id are nested at the end."""
        return self.tracker.run_id

    def __enter__(self) -> Parent:
        self.tracker.start()
        deadline = time.monotonic() + WAIT_S
        while self.id is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if self.id is None:
            log.info("MLflow does not answer yet; the sweep goes on, and its trials are nested below it later.")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.ended:
            return
        stopped = kind is not None and not issubclass(kind, Exception)
        self._settle()
        status: Status = "KILLED" if stopped else "FAILED"
        self.tracker.finish(status, {"status": "stopped" if stopped else "failed"}, timeout_s=10)

    def end(self, result: dict[str, Any], figures: Mapping[str, Any], register_as: str) -> None:
        """End the parent run and register the best model; adds the ids that MLflow gives to `result`.

        `figures`: those of the best trial, which become the sweep's own metrics; `register_as`: `none` for no model.
        """
        self._settle()
        best = result["best"]
        result["registered"] = None
        if best and best["mlflow_run_id"] and register_as != "none":
            model, steps = Path(best["model"]), int(best["steps"])
            result["registered"] = self._try(
                lambda: register(self.plan.tracking_uri, register_as, best["mlflow_run_id"], model, steps)
            )
        self.ended = True
        status: Status = "FINISHED" if best else "FAILED"
        self.tracker.finish(status, {**figures, "status": result["status"]}, timeout_s=60)
        result |= {"mlflow_run_id": self.id, "tracking_uri": self.tracker.uri}

    def _settle(self) -> None:
        files = sorted(self.plan.folder.glob("*/*/mlflow.json")) + sorted(self.plan.runs.glob("*/*/mlflow.json"))
        ids = [json.loads(path.read_text(encoding="utf-8")).get("run_id") for path in files]
        children = [(run_id, "KILLED") for run_id in ids if run_id]
        self._try(lambda: settle_children(self.plan.tracking_uri, self.id, children))

    def _try(self, work: Callable[[], T]) -> T | None:
        """What `work` returns; None, with a message, if MLflow does not answer or refuses."""
        from mlflow.exceptions import MlflowException

        try:
            return work()
        except RefusedError as error:
            log.info(str(error))
        except MlflowException as error:
            log.info(f"MLflow at {self.tracker.uri}: {str(error).splitlines()[0][:160]}; run the same command again.")
        return None


def track_score(
    job: Job, folder: RunFolder, name: str, bits: int, figures: Mapping[str, Any], status: Status = "FINISHED"
) -> str | None:
    """Log the figures of a trained model at `bits` as a run of its own; returns its id, None while MLflow is down."""
    own = folder.path / f"score-{bits}bit"
    own.mkdir(exist_ok=True)
    config, at = job.config, {"quantization.bits": bits}
    trained = folder.result() or {}
    tags = setting_tags(config) | {SETTING + key: value for key, value in at.items()} | dict(job.tags)
    tags |= {SCORED_FROM: str(trained.get("mlflow_run_id")), COMMAND: job.command}
    tags |= {PREFIX + "dataset_fingerprint": job.fingerprints[0], "mlflow.source.name": "finhpc sweep"}
    assert config.run.tracking_uri is not None
    uri, params = config.run.tracking_uri, job.parameters() | at
    tracker = Tracker(Description(own, uri, config.run.experiment, name, params, tags, job.datasets)).start()
    tracker.finish(status, figures, timeout_s=15)
    return tracker.run_id


def send_missed(plan: SweepPlan, parent: str | None) -> None:
    """Send MLflow what it missed of every trial that ended, and add the ids of its runs to the trial's outcome.

    Waits for a server that does not answer as long as the end of one run does, then leaves the rest: the same command
    sends it again. A trial whose data or base is gone does not hold up the others.
    """
    for trial in plan.trials:
        run = plan.run_folder(trial.name)
        if not read_outcome(run) or not _missed(run):
            continue
        log.info(f"sending to MLflow what it missed of trial {trial.name}")
        try:
            _send(run, plan.arguments(trial, parent))
        except FinhpcError as error:
            log.info(f"trial {trial.name} was not sent: {error}")
            continue
        if _missed(run):
            log.info("MLflow does not answer; the same command sends the rest.")
            return


def _send(run: Path, arguments: TrialArguments) -> None:
    record, job, folder = read_record(run), arguments.job(), arguments.folder
    if _unsent(run):
        sent = send_to_mlflow(job, folder, STATUS.get(record["status"], "FAILED"))
        record |= {"mlflow_run_id": sent["mlflow_run_id"]}
    for name, score in record.get("scored", {}).items():
        bits = arguments.scores[name]
        if _unsent(run / f"score-{bits}bit"):
            figures = {key: value for key, value in score.items() if key != "mlflow_run_id"}
            score["mlflow_run_id"] = track_score(job, folder, name, bits, figures)
    write_outcome(run, record)


def _missed(run: Path) -> bool:
    return any(_unsent(path.parent) for path in (run / "mlflow.json", *run.glob("score-*bit/mlflow.json")))


def _unsent(folder: Path) -> bool:
    """Whether the folder has an MLflow run whose end was never recorded."""
    path = folder / "mlflow.json"
    return path.is_file() and json.loads(path.read_text(encoding="utf-8"))["ended"] is None
