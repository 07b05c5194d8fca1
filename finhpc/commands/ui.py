"""`finhpc ui`: MLflow's pages on this machine."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO
from urllib.error import URLError
from urllib.request import urlopen

from finhpc.errors import ConfigError, FinhpcError
from finhpc.files import redact
from finhpc.settings.report import UiConfig
from finhpc.tracking.pages import Pages, pages_of
from finhpc.tracking.store import artifact_location, check_database

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
START_S = 60.0


def ui(config: UiConfig, dry_run: bool = False) -> None:
    """Show tracked runs until interrupted: the comparison of the sweep `run.name`, by default of the newest sweep.

    Prints the addresses, and opens the first one on a desktop; with `dry_run` only checks that it could. Raises
    `ConfigError` for a name that no run has, a database that cannot be read and a port that is in use.
    """
    run, port = config.run, config.port
    uri = run.mlflow_uri
    served = uri.startswith(("http://", "https://"))
    if not served:
        check_database(uri)
        _check_port(port)
    pages = pages_of(uri, run.name)
    if dry_run:
        address = redact(uri) if served else f"http://{HOST}:{port}"
        log.info(f"MLflow's page of {redact(uri)} would open at {address}.")
        return
    if served:
        _show(redact(uri).rstrip("/"), pages)
        return
    # SIGTERM ends the server too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with suppress(KeyboardInterrupt), serving(uri, port) as (server, address):
        _show(address, pages)
        log.info("Press Ctrl-C to end it.")
        server.wait()


def _show(address: str, pages: Pages) -> None:
    """Print the addresses and open the first page in a browser, if this machine has a desktop."""
    log.info(f"MLflow's page: {address}")
    for title, page in pages:
        log.info(f"{title}: {address}/{page}")
    desktop = sys.platform == "darwin" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if desktop and sys.stderr.isatty():
        webbrowser.open(f"{address}/{pages[0][1]}" if pages else address)


@contextmanager
def serving(tracking_uri: str, port: int) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Run an MLflow server over a database, for this machine only."""
    check_database(tracking_uri)
    _check_port(port)
    address = f"http://{HOST}:{port}"
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        # Its libraries' output is only shown if it fails.
        command = server_command(tracking_uri, port)
        server = subprocess.Popen(command, env=server_environment(), stdout=output, stderr=subprocess.STDOUT)
        try:
            _wait_until_healthy(server, address, output)
            yield server, address
        finally:
            server.terminate()
            server.wait()


def server_command(tracking_uri: str, port: int) -> list[str]:
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", tracking_uri]
    if artifacts := artifact_location(tracking_uri):
        command += ["--default-artifact-root", artifacts]
    return [*command, "--host", HOST, "--port", str(port), "--workers", "1", "--uvicorn-opts", "--log-level warning"]


def server_environment() -> dict[str, str]:
    """Turn off the job queue of MLflow's agent tools, which starts processes that finhpc does not need."""
    return {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true", **os.environ}


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ConfigError(
                f"port={port} cannot be used ({error.strerror}); choose another, such as {port + 1}."
            ) from None


def _wait_until_healthy(server: subprocess.Popen[bytes], address: str, output: IO[str]) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise FinhpcError(
                f"the MLflow server ended with code {server.returncode}; correct what it reports, then rerun the "
                f"command:\n{_last_lines(output)}"
            )
        try:
            with urlopen(f"{address}/health", timeout=2) as answer:
                if answer.status == 200:
                    return
        except (URLError, OSError):
            time.sleep(0.2)
    raise FinhpcError(
        f"the MLflow server did not answer at {address} within {START_S:.0f} s; rerun the command when the machine is "
        f"less busy, or choose another --port:\n{_last_lines(output)}"
    )


def _last_lines(output: IO[str]) -> str:
    output.seek(0)
    return "\n".join(output.read().splitlines()[-15:])
