"""Send a run's numbers to MLflow without ever blocking training.

Training writes journals into the run folder (`finhpc.training.journal`). A thread of the driver reads them and sends
the records in batches (`finhpc.tracking.mirror`). The file `mlflow.json` in the folder stores how much was sent, so
nothing is lost or sent twice when the server or the driver dies.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from finhpc.files import redact
from finhpc.settings.training import absolute_tracking_uri
from finhpc.tracking.describe import Dataset
from finhpc.tracking.mirror import Ending, Mirror, State, Status
from finhpc.tracking.store import RefusedError, reason, refuses, set_up_client
from finhpc.training.journal import DRIVER_FILE, Journal, read

log = logging.getLogger(__name__)

__all__ = ["Status", "Tracker"]

POLL_S = 2.0
LONGEST_RETRY_S = 30.0
SAMPLE_S = 10.0


class Tracker:
    """Keeps one MLflow run in step with one run folder, from `start` to `finish`.

    No method raises because of MLflow, and only `finish` and `close` wait for it.
    """

    def __init__(
        self,
        folder: str | Path,
        tracking_uri: str,
        experiment: str,
        run_name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, Any],
        datasets: Sequence[Dataset] = (),
    ) -> None:
        self.folder = Path(folder)
        # Now: the current directory may be another one when the thread gets to it.
        tracking_uri = absolute_tracking_uri(tracking_uri)
        self.uri = redact(tracking_uri)
        self._state = State.load(self.folder, self.uri, experiment, run_name)
        self._mirror = Mirror(self.folder, tracking_uri, self._state, params, tags, datasets)
        self._journal = Journal(self.folder / DRIVER_FILE)
        self._sampler = threading.Thread(target=self._sample, name="finhpc-system-metrics", daemon=True)
        self._thread = threading.Thread(target=self._work, name="finhpc-mlflow", daemon=True)
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._abandoned = threading.Event()
        self._ending: Ending | None = None
        self._error: str | None = None
        self._refused = False

    @property
    def run_id(self) -> str | None:
        """The MLflow run's id; None until MLflow has answered."""
        return self._state.run_id

    def start(self) -> Tracker:
        set_up_client()
        self._sampler.start()
        self._thread.start()
        return self

    def message(self, text: str) -> None:
        """Record a line that is shown on the screen and stays in the run folder."""
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

        Waits at most `timeout_s` (`model_timeout_s` once the model is being uploaded). False if MLflow did not accept
        everything: the rest stays on disk, and the same call in a later process sends it.
        """
        self._ending = Ending(status, dict(result), Path(model) if model else None)
        return self._end(timeout_s, model_timeout_s)

    def close(self, timeout_s: float = 10) -> bool:
        """Send the rest and leave the MLflow run open, for a driver that stops before its run does."""
        return self._end(timeout_s, timeout_s)

    def _end(self, timeout_s: float, model_timeout_s: float) -> bool:
        begin = time.monotonic()
        self._closing.set()
        self._wake.set()
        self._sampler.join()
        self._thread.join(min(3.0, timeout_s))
        if self._thread.is_alive():
            log.info(f"waiting for MLflow at {self.uri}, at most {timeout_s:.0f} s")
        while self._thread.is_alive():
            limit = model_timeout_s if self._ending and self._ending.uploading else timeout_s
            if time.monotonic() - begin > limit:
                break
            self._thread.join(0.1)
        self._abandoned.set()
        sent = not self._thread.is_alive() and not self._refused
        if sent:
            self._journal.close()
        else:
            why = f" ({self._error})" if self._error else ""
            then = "then run" if self._refused else "run"
            log.info(
                f"MLflow at {self.uri} did not accept everything{why}; the rest stays in {self.folder}: "
                f"{then} the same command again to send it."
            )
        return sent

    def _work(self) -> None:
        """The thread: read, send, wait; after an error wait longer and start again from the files on disk."""
        wait = POLL_S
        while not self._abandoned.is_set():
            closing = self._closing.is_set()  # before reading, so that no record is written after it
            try:
                self._mirror.connect()
                if self._mirror.lead(self._ending, closing):
                    while self._mirror.send_batch():
                        self._report_recovery()
                if closing and self._ending:
                    self._mirror.end(self._ending)
                self._report_recovery()
                if closing:
                    return
                wait = POLL_S
            except Exception as error:  # from MLflow or the network: training continues
                self._mirror.disconnect()
                self._report_error(error)
                if closing and refuses(error):  # retrying would not help
                    self._refused = True
                    return
                wait = min(1.0 if closing else 2 * wait, LONGEST_RETRY_S)
            self._wake.wait(wait)
            self._wake.clear()

    def _report_error(self, error: Exception) -> None:
        why = str(error).rstrip(".") if isinstance(error, RefusedError) else reason(error)
        if self._error is None or (why != self._error and refuses(error)):
            log.info(
                f"MLflow at {self.uri} does not accept metrics ({why}); training continues, and they are sent from "
                f"{self.folder} when it does."
            )
        self._error = why

    def _report_recovery(self) -> None:
        if self._error is not None:
            log.info(f"MLflow at {self.uri} is back; the metrics are being sent.")
        self._error = None

    def _sample(self) -> None:
        """Record the machine's load in the driver's journal, under MLflow's own names."""
        step = _last_system_step(self.folder / DRIVER_FILE)
        psutil.cpu_percent()  # the first call only starts the measurement
        while not self._closing.wait(SAMPLE_S):
            step += 1
            try:
                self._journal.write("system", step=step, **_load_of_machine(self.folder))
            except OSError as error:
                log.info(f"system metrics end here: {error.strerror} at {self.folder}; free space and resume the run.")
                return


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
