"""Send a run's numbers to MLflow without ever blocking training.

Training writes journals into the run folder (`finhpc.training.journal`). A thread of the driver reads them and sends
the records in batches (`finhpc.tracking.mirror`). The file `mlflow.json` in the folder stores how much was sent, so
nothing is lost or sent twice when the server or the driver dies.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from finhpc.files import redact
from finhpc.tracking.describe import Description
from finhpc.tracking.mirror import Ending, Mirror, State, Status
from finhpc.tracking.store import RefusedError, reason, refuses, set_up_client
from finhpc.training.journal import DRIVER_FILE, Journal, read

log = logging.getLogger(__name__)

__all__ = ["Status", "Tracker"]

POLL_S = 2.0
LONGEST_RETRY_S = 30.0
SAMPLE_S = 10.0
MODEL_TIMEOUT_S = 900.0


class Tracker:
    """Keeps one MLflow run in step with one run folder, from `start` to `finish`.

    No method raises because of MLflow, and only `finish` waits for it.
    """

    def __init__(self, run: Description) -> None:
        self.folder, self.uri = run.folder, redact(run.tracking_uri)
        self._state = State.load(run.folder, self.uri, run.experiment, run.run_name)
        self._mirror = Mirror(run, self._state)
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

    def finish(
        self, status: Status, result: Mapping[str, Any], model: Path | None = None, timeout_s: float = 60
    ) -> bool:
        """Send the rest, the result and the model folder, and end the MLflow run.

        Waits at most `timeout_s` (`MODEL_TIMEOUT_S` once the model is being uploaded). False if MLflow did not accept
        everything: the rest stays on disk, and the same call in a later process sends it.
        """
        begin = time.monotonic()
        self._closing.set()
        self._sampler.join()
        self._ending = Ending(status, dict(result), model)
        self._wake.set()
        self._thread.join(min(3.0, timeout_s))
        if self._thread.is_alive():
            log.info(f"waiting for MLflow at {self.uri}, at most {timeout_s:.0f} s")
        while self._thread.is_alive():
            limit = MODEL_TIMEOUT_S if self._ending.uploading else timeout_s
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
            ending = self._ending  # before reading, so that no record is written after it
            try:
                self._mirror.connect()
                if self._mirror.lead(ending):
                    while self._mirror.send_batch():
                        self._report_recovery()
                if ending is not None:
                    self._mirror.end(ending)
                self._report_recovery()
                if ending is not None:
                    return
                wait = POLL_S
            except Exception as error:  # from MLflow or the network: training continues
                self._mirror.disconnect()
                self._report_error(error)
                if ending is not None and refuses(error):  # retrying would not help
                    self._refused = True
                    return
                wait = min(2 * wait, LONGEST_RETRY_S) if ending is None else 1.0
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
        records, _ = read(self.folder / DRIVER_FILE)
        step = max((record["step"] for record in records if record["kind"] == "system"), default=0)
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
