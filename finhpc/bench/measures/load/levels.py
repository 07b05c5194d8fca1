"""One load of a server: so many users, in a process of their own, and what they and the server's processes showed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import psutil

from finhpc.bench.measures.load.servers import Server, cpu_s, largest_bytes
from finhpc.bench.report import Row
from finhpc.errors import ConfigError, DataError
from finhpc.serving.metrics import BLOCKS, BLOCKS_USED

USERS = Path(__file__).with_name("users.py")
SAMPLE_S = 1.0
POLL_S = 0.1
OVERTIME_S = 420.0  # for the last answers, beyond what users wait for one


@dataclass(frozen=True)
class Sample:
    """A look at a server. `time`: of `time.monotonic`. `used`, `blocks`: of its cache; None if it does not say."""

    time: float
    resident_bytes: int
    used: int | None
    blocks: int | None


class Watch:
    """Looks at a server once a second from another thread while the `with` block runs."""

    def __init__(self, server: Server, counts_blocks: bool) -> None:
        self.server, self.counts_blocks = server, counts_blocks
        self.processes = server.processes()  # once, because looking for them takes longer than looking at them
        self.samples: list[Sample] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        self._look()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            with suppress(OSError):  # what the users see of it counts
                self._look()

    def _look(self) -> None:
        used, blocks = self.server.gauges(BLOCKS_USED, BLOCKS) if self.counts_blocks else (None, None)
        self.samples.append(Sample(time.monotonic(), largest_bytes(self.processes), used, blocks))


@dataclass(frozen=True)
class Load:
    """What users saw: `answers` as users.py writes them. `server_cores`, `users_cores`: processors that were busy."""

    users: int
    answers: list[dict[str, Any]]
    samples: list[Sample]
    server_cores: float
    users_cores: float

    @property
    def seconds(self) -> float:
        """From the first request to the end of the last answer."""
        return float(max(each["end"] for each in self.answers) - min(each["begin"] for each in self.answers))

    @property
    def errors(self) -> list[str]:
        return [each["error"] for each in self.answers if each["error"] is not None]

    @property
    def tokens_per_s(self) -> float:
        return float(sum(each["tokens"] for each in self.answers) / self.seconds)

    @property
    def first(self) -> list[float]:
        """Seconds from each request to its first token."""
        return [each["times"][0] - each["begin"] for each in self.answers if each["times"]]

    @property
    def between(self) -> list[float]:
        """Seconds between two tokens of an answer."""
        return [after - before for each in self.answers for before, after in pairwise(each["times"])]


def percentiles(name: str, seconds: Sequence[float]) -> Row:
    """Return p50, p95 and p99 of `seconds` in milliseconds, interpolated linearly; None without any."""
    points = (50, 95, 99)
    values = np.percentile(seconds, points) * 1000 if len(seconds) else [None] * len(points)
    return {
        f"{name}_p{point}_ms": None if value is None else float(value)
        for point, value in zip(points, values, strict=True)
    }


def row_of(way: str, loads: Sequence[Load]) -> Row:
    """Return the row of a way to serve, over all its `loads` of as many users."""
    rates = [len(load.answers) / load.seconds for load in loads]
    used = [sample.used for load in loads for sample in load.samples if sample.used is not None]
    samples = [sample for load in loads for sample in load.samples]
    return {
        "way": way,
        "users": loads[0].users,
        "requests": sum(len(load.answers) for load in loads),
        "errors": sum(len(load.errors) for load in loads),
        "requests_per_s": float(np.median(rates)),
        "tokens_per_s": float(np.median([load.tokens_per_s for load in loads])),
        **percentiles("first_token", [value for load in loads for value in load.first]),
        **percentiles("token", [value for load in loads for value in load.between]),
        "resident_bytes": max(sample.resident_bytes for sample in samples),
        "blocks_used": max(used) if used else None,
        "blocks": samples[-1].blocks,
        "server_cores": float(np.median([load.server_cores for load in loads])),
        "users_cores": float(np.median([load.users_cores for load in loads])),
    }


def need_locust() -> None:
    """Raise `ConfigError` if there is no load generator."""
    if find_spec("locust") is None:
        raise ConfigError("bench serve needs locust, which makes the load; run `pip install locust`.")


def run(
    server: Server,
    users: int,
    requests: Sequence[dict[str, Any]],
    seconds: float,
    counts_blocks: bool,
    repeat: bool = False,
    meanwhile: Callable[[subprocess.Popen[bytes]], None] | None = None,
) -> Load:
    """Let `users` send `requests` until all are answered; after `seconds`, or, with `repeat`, only then, none begins.

    `meanwhile` gets the process of the users, and returns when it has ended.
    """
    with tempfile.TemporaryDirectory() as place:
        asked, answered, log = (Path(place, name) for name in ("load.json", "answers.json", "log"))
        load = {"token": server.token, "seconds": seconds, "requests": list(requests), "repeat": repeat}
        asked.touch(0o600)
        asked.write_text(json.dumps(load | {"answers": str(answered)}), encoding="utf-8")
        command = [sys.executable, "-P", "-m", "locust", "-f", str(USERS), "--headless", "--host", server.root]
        command += ["--users", str(users), "--spawn-rate", "1000", "--exit-code-on-error", "0", "--loglevel", "ERROR"]
        begin, before = time.monotonic(), server.cpu_s()
        with open(log, "wb") as file, Watch(server, counts_blocks) as watch:
            process = subprocess.Popen(
                command, stdout=file, stderr=file, cwd=place, env=os.environ | {"FINHPC_LOAD": str(asked)}
            )
            own, locust = 0.0, psutil.Process(process.pid)
            try:
                if meanwhile is not None:
                    meanwhile(process)
                deadline = begin + seconds + OVERTIME_S
                while process.poll() is None and time.monotonic() < deadline:
                    own = max(own, cpu_s(locust))
                    time.sleep(POLL_S)
            finally:
                process.kill()
                process.wait()
        wall = time.monotonic() - begin
        if not answered.exists():
            words = log.read_text(encoding="utf-8", errors="replace").strip()[-1500:]
            raise DataError(f"the users of {server.root} ended without a result; their last words:\n{words}")
        answers = json.loads(answered.read_text(encoding="utf-8"))
        return Load(users, answers, watch.samples, (server.cpu_s() - before) / wall, own / wall)
