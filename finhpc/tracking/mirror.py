"""Send a run folder to one MLflow run, and remember how much was sent.

Nothing here waits or retries: a call raises, and its caller (`finhpc.tracking.tracker`) repeats it later. Sending a
batch twice is harmless: MLflow drops a metric of equal name, step, time and value.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from finhpc.errors import ConfigError
from finhpc.files import redact, strict_json, write_json
from finhpc.tracking.describe import Description
from finhpc.tracking.metrics import LEADING, METRIC_KINDS, numbers, translate
from finhpc.tracking.store import (
    REQUEST_TIMEOUT_S,
    active_run,
    create_database,
    database_file,
    experiment_id,
    identity,
)
from finhpc.tracking.tags import PREFIX
from finhpc.tracking.writer import RunWriter
from finhpc.training.journal import DRIVER_FILE, WORKER_FILE, Record, read

if TYPE_CHECKING:
    from mlflow import MlflowClient

Status = Literal["FINISHED", "FAILED", "KILLED"]

UPLOAD_TIMEOUT_S = "300"
RECORDS_PER_BATCH = 200
STATE = "mlflow.json"  # in the run folder
UID_TAG = PREFIX + "run_uid"
LEAD_WAIT_S = 180.0  # for the first evaluation of a training, before its other metrics are sent without one


@dataclass
class Ending:
    """How a run ended: what `Tracker.finish` was called with."""

    status: Status
    result: dict[str, Any]
    model: Path | None
    uploading: bool = False

    @property
    def name(self) -> str:
        return f"{self.status} at step {self.result.get('steps')}"


@dataclass
class State:
    """How much of the folder was sent to MLflow: `mlflow.json`, written after every batch."""

    path: Path
    tracking_uri: str
    experiment: str
    run_name: str
    run_uid: str  # a tag of the MLflow run, written here before the run is created, to find it again
    run_id: str | None = None
    offsets: dict[str, int] = field(default_factory=dict)  # bytes sent, by journal
    last_step: dict[str, int] = field(default_factory=dict)  # by metric: a resumed run repeats steps
    last_time_ms: int = 0  # of any metric
    model_at: int | None = None  # the step of the model logged last
    ended: str | None = None

    @classmethod
    def load(cls, folder: Path, tracking_uri: str, experiment: str, run_name: str) -> State:
        path = folder / STATE
        try:
            old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        except ValueError as error:
            raise ConfigError(
                f"{path} is not valid JSON ({error}); restore it, or delete it for a new MLflow run."
            ) from None
        if [old.get(key) for key in ("tracking_uri", "experiment", "run_name")] == [tracking_uri, experiment, run_name]:
            return cls(path, **old)
        # Another server or experiment gets everything again; another name means that the folder was copied.
        same_run = old.get("run_name") == run_name
        state = cls(path, tracking_uri, experiment, run_name, old["run_uid"] if same_run else uuid.uuid4().hex)
        state.save()
        return state

    def save(self) -> None:
        values = asdict(self)
        del values["path"]
        write_json(self.path, values)

    def clear_run(self) -> None:
        self.run_id, self.offsets, self.last_step, self.last_time_ms = None, {}, {}, 0
        self.model_at = self.ended = None


def tracked_run(folder: Path, tracking_uri: str) -> tuple[str, str] | None:
    """Address and id of the MLflow run of a run folder; None if MLflow has none.

    Addresses on disk have no passwords: `tracking_uri` is returned if it is the same server's.
    """
    path = folder / STATE
    state = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not state.get("run_id"):
        return None
    uri = tracking_uri if redact(tracking_uri) == state["tracking_uri"] else state["tracking_uri"]
    return uri, str(state["run_id"])


class Mirror:
    """Sends a run folder to MLflow. Each call may raise, and can be repeated."""

    def __init__(self, run: Description, state: State) -> None:
        self.run, self.state = run, state
        self.folder, self.tracking_uri = run.folder, run.tracking_uri
        self._began = round(time.time() * 1000)
        self._client: MlflowClient | None = None
        self._database: tuple[int, int] | None = None  # device and inode of the file that is open
        self._described = self._running = False

    @property
    def client(self) -> MlflowClient:
        assert self._client is not None, "connect() comes first"
        return self._client

    @property
    def run_id(self) -> str:
        assert self.state.run_id is not None, "connect() comes first"
        return self.state.run_id

    @property
    def writer(self) -> RunWriter:
        return RunWriter(self.client, self.run_id)

    def connect(self) -> None:
        """Open the store and make sure that the run exists and is described."""
        if self._client is None:
            from mlflow import MlflowClient

            create_database(self.tracking_uri)
            self._database = identity(self.tracking_uri)
            self._client = MlflowClient(tracking_uri=self.tracking_uri)
            if active_run(self._client, self.state.run_id) is None:
                self.state.clear_run()
                self._described = self._running = False
                self.state.run_id = self._find_or_create_run()
                self.state.save()
        if not self._described:
            self.writer.describe(self.run.params, self.run.tags, self.run.datasets)
            for name in ("config.yaml", "environment.json"):
                if (self.folder / name).exists():
                    self.client.log_artifact(self.run_id, str(self.folder / name))
            self._described = True

    def disconnect(self) -> None:
        self._client = None

    def lead(self, ending: Ending | None) -> bool:
        """Send the leading metric before all others: MLflow's comparison opens with the metric that was logged first.

        False while the others must wait for it: until the first evaluation, the run's end, or `LEAD_WAIT_S`.
        """
        first = LEADING[0]
        if first in self.state.last_step:
            return True
        records, _ = read(self.folder / WORKER_FILE)
        evaluation = next((record for record in records if record["kind"] == "eval" and first in record), None)
        if evaluation is None and ending is not None and ending.result.get(first) is not None:
            step = int(ending.result.get("steps") or 0)
            evaluation = {"kind": "eval", "time": time.time(), "step": step, first: ending.result[first]}
        if evaluation is None:
            begin = next((record["time"] for record in records if record["kind"] == "train"), None)
            return ending is not None or (begin is not None and time.time() - begin >= LEAD_WAIT_S)
        self._check_database()
        self._mark_running()
        self._send([{key: evaluation[key] for key in ("kind", "time", "step", first)}], {})
        return True

    def send_batch(self) -> bool:
        """Send the next records of the journals; False when there are none."""
        self._check_database()
        for name in (WORKER_FILE, DRIVER_FILE):
            offset = self.state.offsets.get(name, 0)
            records, new_offset = read(self.folder / name, offset, limit=RECORDS_PER_BATCH)
            if new_offset == offset:
                continue
            self._mark_running()
            self._send(records, self.state.last_step, offsets={name: new_offset})
            return True
        return False

    def end(self, ending: Ending) -> None:
        """Send the result, the model and the status."""
        self._check_database()
        if self.state.ended == ending.name:
            return
        step = int(ending.result.get("steps") or 0)
        self._log_result(ending.result, step)
        self.client.log_text(self.run_id, redact(strict_json(ending.result, indent=2)), "result.json")
        if ending.model and self.state.model_at != step:
            from finhpc.tracking.pyfunc import log_model

            ending.uploading = True
            with _upload_timeout():
                log_model(self.client, self.run_id, ending.model, step=step)
            self.state.model_at = step
            self.state.save()
        self.client.set_terminated(self.run_id, status=ending.status)
        self.state.ended = ending.name
        self.state.save()

    def _check_database(self) -> None:
        """A deleted database that is still open accepts everything and stores nothing."""
        if identity(self.tracking_uri) != self._database:
            raise FileNotFoundError(f"{database_file(self.tracking_uri)} was deleted or replaced")

    def _log_result(self, result: Mapping[str, Any], step: int) -> None:
        """Make MLflow's list of runs show the result's figures.

        It shows a metric's last value by step, then time. The speed of the whole run therefore follows that of the
        last step, at the same step. A figure that is already shown is not sent again.
        """
        shown = self.client.get_run(self.run_id).data.metrics
        new = {key: value for key, value in numbers(result) if shown.get(key) != float(value)}
        # The clock of the worker's machine may be ahead of this one's.
        when = max(time.time(), (self.state.last_time_ms + 1) / 1000)
        self._send([{**new, "kind": "result", "time": when, "step": step}], {}, {"result"})

    def _send(
        self,
        records: list[Record],
        last_step: Mapping[str, int],
        kinds: set[str] = METRIC_KINDS,
        offsets: Mapping[str, int] | None = None,
    ) -> None:
        """Send metrics and tags of records, and store that they and the journals up to `offsets` were sent."""
        metrics, tags, newest = translate(records, last_step, kinds)
        self.writer.log(metrics, tags)
        state = self.state
        state.offsets |= offsets or {}
        state.last_step |= newest
        state.last_time_ms = max([state.last_time_ms, *(metric.timestamp for metric in metrics)])
        state.save()

    def _find_or_create_run(self) -> str:
        """The run that a driver created before it died without recording it; otherwise a new one."""
        experiment = experiment_id(self.client, self.tracking_uri, self.state.experiment)
        uid = {UID_TAG: self.state.run_uid}
        query = f"tags.`{UID_TAG}` = '{self.state.run_uid}'"
        found = self.client.search_runs([experiment], query, max_results=1)
        # The run began when its driver did, not when MLflow first answered.
        run = found[0] if found else self.client.create_run(experiment, self._began, uid, self.state.run_name)
        return str(run.info.run_id)

    def _mark_running(self) -> None:
        """New records mean that the run continues, whatever its last driver reported."""
        if not self._running:
            self.client.update_run(self.run_id, status="RUNNING")
            self.state.ended = None
            self._running = True


@contextmanager
def _upload_timeout() -> Iterator[None]:
    """Allow more time for uploading a model than for a batch of metrics, unless the user set a limit."""
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    if ours := os.environ.get(name) == REQUEST_TIMEOUT_S:
        os.environ[name] = UPLOAD_TIMEOUT_S
    try:
        yield
    finally:
        if ours:
            os.environ[name] = REQUEST_TIMEOUT_S
