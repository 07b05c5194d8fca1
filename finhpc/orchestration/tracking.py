"""A run's numbers in MLflow, without ever standing in the way of training.

Training writes journals into the run folder (`finhpc.training.journal`). A thread of the driver
reads them and sends what it finds in batches. The file `mlflow.json` in the folder remembers how
far it came, so nothing is lost, or sent twice, when the server or the driver dies. Sending the same
batch again is harmless: MLflow drops a metric of equal name, step, time and value.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil

from finhpc.errors import ConfigError
from finhpc.orchestration.runfolder import redact, write_atomically
from finhpc.training.journal import DRIVER_FILE, WORKER_FILE, Journal, Record, read, strict_json

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

Status = Literal["FINISHED", "FAILED", "KILLED"]

METRIC_KINDS = {"train", "eval", "memory", "system"}
POLL_S = 2.0
LONGEST_RETRY_S = 30.0
SAMPLE_S = 10.0
REQUEST_TIMEOUT_S = "10"
UPLOAD_TIMEOUT_S = "300"
RECORDS_A_BATCH = 200
METRICS_A_BATCH = 1000  # MLflow's limits
PARAMS_A_BATCH = 100
PARAM_LENGTH = 6000
TAG_LENGTH = 8000
UID_TAG = "finhpc.run_uid"


def default_tracking_uri(storage: str | Path) -> str:
    """A database file beside the run folders."""
    folder = os.path.abspath(Path(storage).expanduser())
    if set(folder) & set("?#%"):
        raise ConfigError(
            f"run.storage={folder} holds a character (one of ? # %) that no sqlite address can; "
            f"rename the folder or give run.tracking_uri."
        )
    return f"sqlite:///{folder}/mlflow.db"


def database_file(tracking_uri: str) -> Path | None:
    """The file of a sqlite address; None for a server."""
    if not tracking_uri.startswith("sqlite:///"):
        return None
    return Path(tracking_uri.removeprefix("sqlite:///"))


def artifact_location(tracking_uri: str) -> str | None:
    """Where a sqlite database's artifacts lie: beside it. A server decides for itself."""
    database = database_file(tracking_uri)
    return str(database.parent / "mlartifacts") if database else None


class Tracker:
    """Keeps one MLflow run in step with one run folder, from `start` to `finish`.

    `say` prints one line to the user. No method raises because of MLflow, and none but `finish` and
    `close` waits for it.
    """

    def __init__(
        self,
        folder: str | Path,
        tracking_uri: str,
        experiment: str,
        run_name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, Any],
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.uri = redact(tracking_uri)
        self._state = _State.load(self.folder, self.uri, experiment, run_name)
        self._mirror = _Mirror(self.folder, tracking_uri, self._state, params, tags)
        self._say = say or _to_stderr
        self._journal = Journal(self.folder / DRIVER_FILE)
        self._sampler = threading.Thread(target=self._sample, name="finhpc-system-metrics", daemon=True)
        self._thread = threading.Thread(target=self._work, name="finhpc-mlflow", daemon=True)
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._abandoned = threading.Event()
        self._ending: _Ending | None = None
        self._complaint: str | None = None

    @property
    def run_id(self) -> str | None:
        """The MLflow run's id; None as long as MLflow never answered."""
        return self._state.run_id

    def start(self) -> Tracker:
        # Short waits and no retries of its own: the thread tries again anyway, and must notice the run's end.
        for name, value in (("MAX_RETRIES", "0"), ("TIMEOUT", REQUEST_TIMEOUT_S)):
            os.environ.setdefault(f"MLFLOW_HTTP_REQUEST_{name}", value)
        # MLflow prints addresses on stdout, which belongs to results.
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        self._sampler.start()
        self._thread.start()
        return self

    def message(self, text: str) -> None:
        """A line for the screen that stays in the run folder."""
        self._journal.write("message", text=text)

    def finish(
        self,
        status: Status,
        result: Mapping[str, Any],
        model: str | Path | None = None,
        timeout_s: float = 60,
        model_timeout_s: float = 900,
    ) -> bool:
        """Send the rest, the result and the model folder, and end the MLflow run.

        Waits at most `timeout_s` (`model_timeout_s` once the model is on its way). False when MLflow did
        not take it all: it stays on disk, and the same call in a later process sends it.
        """
        self._ending = _Ending(status, dict(result), Path(model) if model else None)
        return self._end(timeout_s, model_timeout_s)

    def close(self, timeout_s: float = 10) -> bool:
        """Send the rest and leave the MLflow run as it is (a driver that stops before its run does)."""
        return self._end(timeout_s, timeout_s)

    def _end(self, timeout_s: float, model_timeout_s: float) -> bool:
        begin = time.monotonic()
        self._closing.set()
        self._wake.set()
        self._sampler.join()
        self._thread.join(min(3.0, timeout_s))
        if self._thread.is_alive():
            self._say(f"waiting for MLflow at {self.uri}, at most {timeout_s:.0f} s")
        while self._thread.is_alive():
            limit = model_timeout_s if self._ending and self._ending.uploading else timeout_s
            if time.monotonic() - begin > limit:
                break
            self._thread.join(0.1)
        self._abandoned.set()
        sent = not self._thread.is_alive()
        if sent:
            self._journal.close()
        else:
            why = f" ({self._complaint})" if self._complaint else ""
            self._say(
                f"MLflow at {self.uri} did not take everything{why}; the rest is kept in {self.folder}: "
                f"run the same command again to send it."
            )
        return sent

    def _work(self) -> None:
        """The thread: read, send, wait; after an error wait longer and begin again from what is on disk."""
        wait = POLL_S
        while not self._abandoned.is_set():
            closing = self._closing.is_set()  # asked before reading, so that nothing is written after it
            try:
                self._mirror.connect()
                while self._mirror.send_batch():
                    self._cheer()
                if closing and self._ending:
                    self._mirror.end(self._ending)
                self._cheer()
                if closing:
                    return
                wait = POLL_S
            except Exception as error:  # whatever MLflow or the network comes up with: training goes on
                self._mirror.disconnect()
                self._complain(error)
                wait = min(1.0 if closing else 2 * wait, LONGEST_RETRY_S)
            self._wake.wait(wait)
            self._wake.clear()

    def _complain(self, error: Exception) -> None:
        if self._complaint is None:
            self._say(
                f"MLflow at {self.uri} does not take metrics ({_reason(error)}); training goes on, "
                f"they are kept in {self.folder} and sent when it does."
            )
        self._complaint = _reason(error)

    def _cheer(self) -> None:
        if self._complaint is not None:
            self._say(f"MLflow at {self.uri} is back; what was kept is being sent.")
        self._complaint = None

    def _sample(self) -> None:
        """The machine's load into the driver's journal, under MLflow's own names for it."""
        step = _last_system_step(self.folder / DRIVER_FILE)
        psutil.cpu_percent()  # the first call only starts the measurement
        while not self._closing.wait(SAMPLE_S):
            step += 1
            try:
                self._journal.write("system", step=step, **_load_of_machine(self.folder))
            except OSError as error:
                self._say(f"system metrics end here: {error.strerror} at {self.folder}; free space and resume the run.")
                return


@dataclass
class _Ending:
    """What `finish` asks for."""

    status: Status
    result: dict[str, Any]
    model: Path | None
    uploading: bool = False

    @property
    def name(self) -> str:
        return f"{self.status} at step {self.result.get('steps')}"


@dataclass
class _State:
    """How far the folder is mirrored: `mlflow.json`, written after every batch."""

    path: Path
    tracking_uri: str
    experiment: str
    run_name: str
    run_uid: str  # a tag of the MLflow run, written here before the run is made, by which it is found again
    run_id: str | None = None
    offsets: dict[str, int] = field(default_factory=dict)  # bytes read, by journal
    last_step: dict[str, int] = field(default_factory=dict)  # by metric: a resumed run repeats steps
    model_at: int | None = None  # the step of the model logged last
    ended: str | None = None

    @classmethod
    def load(cls, folder: Path, tracking_uri: str, experiment: str, run_name: str) -> _State:
        path = folder / "mlflow.json"
        try:
            old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        except ValueError as error:
            raise ConfigError(
                f"{path} is not valid JSON ({error}); restore it, or delete it for a new MLflow run."
            ) from None
        if [old.get(key) for key in ("tracking_uri", "experiment", "run_name")] == [tracking_uri, experiment, run_name]:
            return cls(path, **old)
        # Another server or experiment gets the whole story again; another name is a copied folder.
        same_run = old.get("run_name") == run_name
        state = cls(path, tracking_uri, experiment, run_name, old["run_uid"] if same_run else uuid.uuid4().hex)
        state.save()
        return state

    def save(self) -> None:
        values = asdict(self)
        del values["path"]
        write_atomically(self.path, json.dumps(values, indent=1))

    def forget_run(self) -> None:
        self.run_id, self.offsets, self.last_step, self.model_at, self.ended = None, {}, {}, None, None


class _Mirror:
    """The calls to MLflow. Each may raise; each can be made again."""

    def __init__(
        self, folder: Path, tracking_uri: str, state: _State, params: Mapping[str, Any], tags: Mapping[str, Any]
    ) -> None:
        self.folder, self.tracking_uri, self.state = folder, tracking_uri, state
        self.params = {key: redact(str(value))[:PARAM_LENGTH] for key, value in params.items()}
        self.tags = {key: redact(str(value))[:TAG_LENGTH] for key, value in tags.items()}
        self._began = round(time.time() * 1000)
        self._client: MlflowClient | None = None
        self._described = self._running = False

    @property
    def client(self) -> MlflowClient:
        assert self._client is not None, "connect() comes first"
        return self._client

    @property
    def run_id(self) -> str:
        assert self.state.run_id is not None, "connect() comes first"
        return self.state.run_id

    def connect(self) -> None:
        """Make sure that the run is there, and bears its settings."""
        if self._client is None:
            from mlflow import MlflowClient

            _make_database(self.tracking_uri)
            self._client = MlflowClient(tracking_uri=self.tracking_uri)
            if not self._run_is_alive():
                self.state.forget_run()
                self.state.run_id = self._find_run() or self._create_run()
                self.state.save()
        if not self._described:
            self._describe()
            self._described = True

    def disconnect(self) -> None:
        self._client = None

    def send_batch(self) -> bool:
        """Send the next records of the journals; False when there are none."""
        for name in (WORKER_FILE, DRIVER_FILE):
            offset = self.state.offsets.get(name, 0)
            records, new_offset = read(self.folder / name, offset, limit=RECORDS_A_BATCH)
            if new_offset == offset:
                continue
            self._mark_running()
            metrics, tags, last_step = _translate(records, self.state.last_step)
            self._log(metrics, tags)
            self.state.offsets[name] = new_offset
            self.state.last_step |= last_step
            self.state.save()
            return True
        return False

    def end(self, ending: _Ending) -> None:
        """The result, the model and the status."""
        if self.state.ended == ending.name:
            return
        step = int(ending.result.get("steps") or 0)
        record = {**ending.result, "kind": "result", "time": time.time(), "step": step}
        metrics, tags, last_step = _translate([record], self.state.last_step, kinds={"result"})
        self._log(metrics, tags)
        self.state.last_step |= last_step
        self.state.save()
        self.client.log_text(self.run_id, redact(strict_json(ending.result, indent=2)), "result.json")
        if ending.model and self.state.model_at != step:
            from finhpc.orchestration.pyfunc import log_model

            ending.uploading = True
            with _patience():
                log_model(self.client, self.run_id, ending.model, step=step)
            self.state.model_at = step
            self.state.save()
        self.client.set_terminated(self.run_id, status=ending.status)
        self.state.ended = ending.name
        self.state.save()

    def _run_is_alive(self) -> bool:
        from mlflow.exceptions import MlflowException

        if self.state.run_id is None:
            return False
        try:
            return bool(self.client.get_run(self.run_id).info.lifecycle_stage == "active")
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise

    def _find_run(self) -> str | None:
        """The run that a driver made and died before writing down."""
        query = f"tags.`{UID_TAG}` = '{self.state.run_uid}'"
        runs = self.client.search_runs([self._experiment_id()], query, max_results=1)
        return str(runs[0].info.run_id) if runs else None

    def _create_run(self) -> str:
        tags = {UID_TAG: self.state.run_uid}
        # The run began when its driver did, not when MLflow first answered.
        run = self.client.create_run(self._experiment_id(), self._began, tags, self.state.run_name)
        return str(run.info.run_id)

    def _experiment_id(self) -> str:
        from mlflow.exceptions import MlflowException

        name = self.state.experiment
        if found := self.client.get_experiment_by_name(name):
            return str(found.experiment_id)
        try:
            return str(self.client.create_experiment(name, artifact_location(self.tracking_uri)))
        except MlflowException:  # another run was first
            if found := self.client.get_experiment_by_name(name):
                return str(found.experiment_id)
            raise

    def _describe(self) -> None:
        from mlflow.entities import Param

        known = self.client.get_run(self.run_id).data.params
        new = [Param(key, value) for key, value in self.params.items() if key not in known]
        for begin in range(0, len(new), PARAMS_A_BATCH):
            self.client.log_batch(self.run_id, params=new[begin : begin + PARAMS_A_BATCH])
        # MLflow keeps a parameter's first value; what a resumed run may change is told as a tag.
        changed = {f"now.{key}": value for key, value in self.params.items() if known.get(key, value) != value}
        self._log([], self.tags | changed)
        for name in ("config.yaml", "environment.json"):
            if (self.folder / name).exists():
                self.client.log_artifact(self.run_id, str(self.folder / name))

    def _mark_running(self) -> None:
        """New records mean that the run goes on, whatever its last driver said."""
        if not self._running:
            self.client.update_run(self.run_id, status="RUNNING")
            self.state.ended = None
            self._running = True

    def _log(self, metrics: list[Metric], tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        pending = [RunTag(key, value[:TAG_LENGTH]) for key, value in tags.items()]
        for begin in range(0, len(pending), PARAMS_A_BATCH):
            self.client.log_batch(self.run_id, tags=pending[begin : begin + PARAMS_A_BATCH])
        for begin in range(0, len(metrics), METRICS_A_BATCH):
            self.client.log_batch(self.run_id, metrics=metrics[begin : begin + METRICS_A_BATCH])


def _make_database(tracking_uri: str) -> None:
    """Build a new sqlite database aside and move it into place.

    MLflow builds its tables for seconds at the first use. A second process that looks in meanwhile, or a
    kill, leaves a database that nothing can open.
    """
    if (path := database_file(tracking_uri)) is None or path.exists():
        return
    from mlflow import MlflowClient

    with open(path.with_name(f".{path.name}.lock"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():  # another run was first
            return
        draft = path.with_name(f".{path.name}.draft")
        draft.unlink(missing_ok=True)
        MlflowClient(f"sqlite:///{draft}").search_experiments(max_results=1)
        os.rename(draft, path)


def _translate(
    records: list[Record], last_step: Mapping[str, int], kinds: set[str] = METRIC_KINDS
) -> tuple[list[Metric], dict[str, str], dict[str, int]]:
    """Records as metrics and tags, and the newest step of each metric.

    A step that a metric already has is left out: the first telling of a repeated step stands.
    """
    from mlflow.entities import Metric

    metrics: list[Metric] = []
    tags: dict[str, str] = {}
    newest: dict[str, int] = {}
    for record in records:
        if record["kind"] == "start":
            told = {key: value for key, value in record.items() if key not in ("kind", "time")}
            tags |= {f"finhpc.start.{key}": redact(str(value)) for key, value in told.items()}
        if record["kind"] not in kinds:
            continue
        for key, value in _numbers(record):
            if record["step"] <= newest.get(key, last_step.get(key, -1)):
                continue
            if not math.isfinite(value):  # MLflow would store infinity as 1.8e308
                tags["finhpc.not_finite"] = f"{key} at step {record['step']}: {value}"
                continue
            metrics.append(Metric(key, float(value), round(record["time"] * 1000), record["step"]))
            newest[key] = record["step"]
    return metrics, tags, newest


def _numbers(record: Record) -> Iterator[tuple[str, float]]:
    """Name and value of every number in a record; a list holds one a worker."""
    prefix = "system/" if record["kind"] == "system" else ""
    for key, value in record.items():
        if key in ("kind", "time", "step"):
            continue
        many = isinstance(value, list)
        for index, item in enumerate(value if many else [value]):
            if isinstance(item, int | float) and not isinstance(item, bool):
                yield f"{prefix}{key}_worker{index}" if many else f"{prefix}{key}", item


@contextmanager
def _patience() -> Iterator[None]:
    """Uploading a model takes longer than a batch of metrics; a time limit the user set stands."""
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    if ours := os.environ.get(name) == REQUEST_TIMEOUT_S:
        os.environ[name] = UPLOAD_TIMEOUT_S
    try:
        yield
    finally:
        if ours:
            os.environ[name] = REQUEST_TIMEOUT_S


def _reason(error: Exception) -> str:
    """The heart of an error, without addresses and passwords."""
    text = redact(str(error))
    if "timed out" in text:
        return "no answer in time"
    if found := re.search(r"\[Errno -?\d+\] ([^'\")\]]+)", text):
        return found[1].strip()
    return (text.splitlines() or [""])[0][:160] or type(error).__name__


def _load_of_machine(folder: Path) -> dict[str, float]:
    memory, disk = psutil.virtual_memory(), psutil.disk_usage(str(folder))
    return {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / 1e6,
        "system_memory_usage_percentage": memory.percent,
        "disk_usage_percentage": disk.percent,
        "disk_available_megabytes": disk.free / 1e6,
    }


def _last_system_step(path: Path) -> int:
    return max((record["step"] for record in read(path)[0] if record["kind"] == "system"), default=0)


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
