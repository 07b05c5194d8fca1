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
from finhpc.runs.run import tell_mlflow
from finhpc.tracking.shown import HIDDEN, PARENT, SCORED_FROM, SETTING, setting_tags
from finhpc.tracking.store import RefusedError, active_run
from finhpc.tracking.tracker import Status, Tracker

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from finhpc.commands.sweep.plan import SweepPlan

log = logging.getLogger(__name__)

T = TypeVar("T")

BEST = "best"  # the alias
WAIT_S = 20.0  # for MLflow to give the parent its id, before the trials start
STATUS: dict[str, Status] = {"finished": "FINISHED", "pruned": "KILLED"}  # of a trial's run, else FAILED


class Parent:
    """The sweep's own MLflow run, as a context. `id`: None until MLflow has answered."""

    def __init__(self, plan: SweepPlan, folder: RunFolder) -> None:
        config = plan.config
        self.plan = plan
        commit = folder.write_environment()["git_commit"]
        tags = setting_tags(config) | plan.tags | {HIDDEN + "verb": "sweep", "mlflow.source.name": "finhpc sweep"}
        tags |= {"mlflow.source.git.commit": commit} if commit else {}
        self.tracker = Tracker(
            folder.path, plan.tracking_uri, config.run.experiment, config.run.name, plan.shared_parameters(), tags,
            plan.datasets,
        )  # fmt: skip
        self.ended = False

    def __enter__(self) -> Parent:
        self.tracker.start()
        self.id = wait_for_id(self.tracker)
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
        result |= {"mlflow_run_id": self.tracker.run_id, "tracking_uri": self.tracker.uri}

    def _settle(self) -> None:
        files = sorted(self.plan.folder.glob("*/*/mlflow.json")) + sorted(self.plan.runs.glob("*/*/mlflow.json"))
        ids = [json.loads(path.read_text(encoding="utf-8")).get("run_id") for path in files]
        children = [(run_id, "KILLED") for run_id in ids if run_id]
        self._try(lambda: settle_children(self.plan.tracking_uri, self.tracker.run_id, children))

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


def wait_for_id(tracker: Tracker) -> str | None:
    """The parent's id; None if MLflow does not answer in time, in which case the children are nested at the end."""
    deadline = time.monotonic() + WAIT_S
    while tracker.run_id is None and time.monotonic() < deadline:
        time.sleep(0.05)
    if tracker.run_id is None:
        log.info("MLflow does not answer yet; the sweep goes on, and its trials are nested below it later.")
    return tracker.run_id


def track_score(
    job: Job, folder: RunFolder, name: str, bits: int, figures: Mapping[str, Any], status: Status = "FINISHED"
) -> str | None:
    """Log the figures of a trained model at `bits` as a run of its own; returns its id, None while MLflow is down."""
    own = folder.path / f"score-{bits}bit"
    own.mkdir(exist_ok=True)
    config, at = job.config, {"quantization.bits": bits}
    trained = folder.result() or {}
    tags = setting_tags(config) | {SETTING + key: value for key, value in at.items()} | dict(job.tags)
    tags |= {SCORED_FROM: str(trained.get("mlflow_run_id")), HIDDEN + "verb": job.verb}
    tags |= {HIDDEN + "dataset_fingerprint": job.fingerprints[0], "mlflow.source.name": "finhpc sweep"}
    assert config.run.tracking_uri is not None
    tracker = Tracker(
        own, config.run.tracking_uri, config.run.experiment, name, job.parameters() | at, tags, job.datasets,
    )  # fmt: skip
    tracker.start()
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
        sent = tell_mlflow(job, folder, STATUS.get(record["status"], "FAILED"))
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


def settle_children(tracking_uri: str, parent: str | None, children: list[tuple[str, str]]) -> None:
    """Nest runs (id, status) below the parent; those that a killed process left RUNNING get their status.

    Runs that were deleted in MLflow are skipped. Raises `MlflowException` if MLflow does not answer.
    """
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=tracking_uri)
    for run_id, status in children:
        run = active_run(client, run_id)
        if run is None:
            continue
        if parent and run.data.tags.get(PARENT) != parent:
            client.set_tag(run_id, PARENT, parent)
        if run.info.status == "RUNNING":
            client.set_terminated(run_id, status=status)


def register(tracking_uri: str, name: str, run_id: str, model: Path, steps: int) -> str:
    """Register the model folder as a version of `name`, with the alias `best`; returns its MLflow address.

    A run is registered only once. Raises `RefusedError` for a run that was deleted in MLflow.
    """
    from mlflow import MlflowClient

    from finhpc.tracking.pyfunc import log_model

    client = MlflowClient(tracking_uri=tracking_uri)
    run = active_run(client, run_id)
    if run is None:
        raise RefusedError(
            f"the run of the best trial was deleted in MLflow, so nothing is registered as {name}; restore it "
            f"(mlflow runs restore --run-id {run_id}), then run the same command again."
        )
    if not client.search_registered_models(filter_string=f"name = '{name}'"):
        client.create_registered_model(name, description="The best models of finhpc sweeps.")
    known = [v for v in client.search_model_versions(f"name = '{name}'") if v.run_id == run_id]
    if known:
        version = known[0].version
    else:
        logged = run.outputs.model_outputs if run.outputs else []
        ids = [output.model_id for output in logged if _exists(client, output.model_id)]
        if not ids:
            log_model(client, run_id, model, step=steps)
            ids = [output.model_id for output in client.get_run(run_id).outputs.model_outputs]
        source = client.get_logged_model(ids[-1]).artifact_location  # models:/ID would be looked for elsewhere
        version = client.create_model_version(name, source, run_id=run_id, model_id=ids[-1]).version
    client.set_registered_model_alias(name, BEST, version)
    return f"models:/{name}@{BEST}"


def _exists(client: MlflowClient, model_id: str) -> bool:
    """Whether a logged model was not deleted in MLflow."""
    from mlflow.exceptions import MlflowException

    try:
        client.get_logged_model(model_id)
    except MlflowException:
        return False
    return True
