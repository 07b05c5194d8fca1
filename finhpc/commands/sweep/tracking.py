"""A sweep in MLflow: one parent run, its trials nested below, the best model in the registry."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from finhpc.files import write_json
from finhpc.runs.folder import RunFolder
from finhpc.runs.job import Job
from finhpc.tracking.shown import HIDDEN, PARENT, SCORED_FROM, SETTING, SWEEP, setting_tags
from finhpc.tracking.store import RefusedError, active_run
from finhpc.tracking.tracker import Status, Tracker

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from finhpc.commands.sweep.grid import AnySweep
    from finhpc.commands.sweep.plan import Planned

log = logging.getLogger(__name__)

T = TypeVar("T")

BEST = "best"  # the alias
WAIT_S = 20.0  # for MLflow to give the parent its id, before the trials start


class Parent:
    """`with Parent(...) as parent:` the sweep's own MLflow run. `id`: None as long as MLflow never answered."""

    def __init__(self, config: AnySweep, folder: RunFolder, plan: Planned) -> None:
        self.plan, self.config = plan, config
        environment = folder.write_environment()
        tags = setting_tags(config) | {SWEEP: config.run.name, HIDDEN + "verb": "sweep"}
        tags |= {"mlflow.source.name": "finhpc sweep"}
        tags |= {"mlflow.source.git.commit": environment["git_commit"]} if environment["git_commit"] else {}
        uri, experiment = plan.tracking_uri, config.run.experiment
        params, datasets = plan.shared_parameters(), plan.datasets
        self.tracker = Tracker(folder.path, uri, experiment, config.run.name, params, tags, datasets)
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
        self.tracker.finish(
            "KILLED" if stopped else "FAILED", {"status": "stopped" if stopped else "failed"}, timeout_s=10
        )

    def end(self, result: dict[str, Any], figures: Mapping[str, Any]) -> None:
        """The outcome: children below the parent, the best one registered; adds what MLflow says to `result`.

        `figures`: of the best trial, which become the sweep's own metrics.
        """
        self._settle()
        best, name = result["best"], self.config.sweep.register_as or self.config.run.name
        result |= {"registered": None}
        if best and best["mlflow_run_id"] and name != "none":
            model, steps = Path(best["model"]), int(best["steps"])
            result["registered"] = self._try(
                lambda: register(self.plan.tracking_uri, name, best["mlflow_run_id"], model, steps)
            )
        self.ended = True
        status: Status = "FINISHED" if best else "FAILED"
        self.tracker.finish(status, {**figures, "status": result["status"]}, timeout_s=60)
        result |= {"mlflow_run_id": self.tracker.run_id, "tracking_uri": self.tracker.uri}

    def _settle(self) -> None:
        children = []
        for path in sorted(self.plan.folder.glob("*/*/mlflow.json")) + sorted(self.plan.runs.glob("*/*/mlflow.json")):
            run_id = json.loads(path.read_text(encoding="utf-8")).get("run_id")
            if run_id:
                children.append((run_id, "KILLED"))
        self._try(lambda: settle_children(self.plan.tracking_uri, self.tracker.run_id, children))

    def _try(self, work: Callable[[], T]) -> T | None:
        """What `work` returns; None, and a line, where MLflow does not answer or refuses."""
        from mlflow.exceptions import MlflowException

        try:
            return work()
        except RefusedError as error:
            log.info(str(error))
            return None
        except MlflowException as error:
            log.info(f"MLflow at {self.tracker.uri}: {str(error).splitlines()[0][:160]}; run the same command again.")
            return None


def wait_for_id(tracker: Tracker) -> str | None:
    """The parent's id; None where MLflow does not answer in time: its children are told at the end."""
    deadline = time.monotonic() + WAIT_S
    while tracker.run_id is None and time.monotonic() < deadline:
        time.sleep(0.05)
    if tracker.run_id is None:
        log.info("MLflow does not answer yet; the sweep goes on, and its trials are put below it when MLflow is back.")
    return tracker.run_id


def track_score(
    job: Job, folder: RunFolder, name: str, bits: int, figures: Mapping[str, Any], status: Status = "FINISHED"
) -> str | None:
    """Log the figures of a trained model at `bits` as a run of its own; returns its id, None while MLflow is down."""
    own = folder.path / f"score-{bits}bit"
    own.mkdir(exist_ok=True)
    write_json(own / "result.json", figures)
    config, at = job.config, {"quantization.bits": bits}
    params = job.parameters() | at
    trained = RunFolder(config.run.storage, config.run.name).result() or {}
    tags = setting_tags(config) | {SETTING + key: value for key, value in at.items()} | dict(job.tags)
    tags |= {SCORED_FROM: str(trained.get("mlflow_run_id")), HIDDEN + "verb": job.verb}
    tags |= {HIDDEN + "dataset_fingerprint": job.fingerprints[0], "mlflow.source.name": "finhpc sweep"}
    run, datasets = config.run, job.datasets
    assert run.tracking_uri is not None
    tracker = Tracker(own, run.tracking_uri, run.experiment, name, params, tags, datasets)
    tracker.start()
    tracker.finish(status, figures, timeout_s=15)
    return tracker.run_id


def settle_children(tracking_uri: str, parent: str | None, children: list[tuple[str, str]]) -> None:
    """Put runs (id, status) below the parent; those that a killed process left RUNNING get their status.

    Runs that somebody deleted in MLflow are left alone. Raises `MlflowException` where MLflow does not answer.
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
    """Make the model folder a version of `name` in the registry, with the alias `best`; returns MLflow's address of it.

    The same run is registered once. Raises `RefusedError` for a run that was deleted in MLflow.
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
