"""Waiting for what other processes and threads do, on a machine however loaded."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PATIENCE_S = 500.0  # for a command to end, or for an event


def wait_until(
    condition: Callable[[], Any],
    process: subprocess.Popen[Any] | None = None,
    log: Path | None = None,
    *,
    pause_s: float = 0.02,
) -> None:
    """Wait until `condition()` is true; fail with the end of `log` if `process` ends first, or after `PATIENCE_S`."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert process is None or process.poll() is None or condition(), last_words(log)
        assert time.monotonic() < deadline, last_words(log)
        time.sleep(pause_s)


def last_words(log: Path | None) -> str:
    return log.read_text(errors="replace")[-3000:] if log else "it did not happen in time"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
