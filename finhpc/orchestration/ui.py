"""The MLflow page on this machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.error import URLError
from urllib.request import urlopen

from finhpc.config import UiConfig
from finhpc.errors import ConfigError, FinhpcError
from finhpc.orchestration.mlflow_store import artifact_location, database_file
from finhpc.orchestration.runfolder import redact
from finhpc.orchestration.tracking import absolute_tracking_uri, default_tracking_uri

HOST = "127.0.0.1"
START_S = 60.0


def ui(config: UiConfig, dry_run: bool = False) -> None:
    """Show what was tracked, until interrupted; with `dry_run` check that it could be shown."""
    run, port = config.run, config.port
    uri = absolute_tracking_uri(run.tracking_uri) if run.tracking_uri else default_tracking_uri(run.storage)
    if uri.startswith(("http://", "https://")):
        print(f"run.tracking_uri is a server already; open {redact(uri)} in a browser.", file=sys.stderr)
        return
    if dry_run:
        check_database(uri)
        _check_port(port)
        print(f"MLflow's page of {redact(uri)} would open at http://{HOST}:{port}.", file=sys.stderr)
        return
    # Being told to end ends the server too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with suppress(KeyboardInterrupt), serving(uri, port) as (server, address):
        print(f"MLflow page: {address} (Ctrl-C ends it)", file=sys.stderr, flush=True)
        server.wait()


@contextmanager
def serving(tracking_uri: str, port: int) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """An MLflow server over a database, for this machine alone; ended on leaving."""
    check_database(tracking_uri)
    _check_port(port)
    address = f"http://{HOST}:{port}"
    server = subprocess.Popen(server_command(tracking_uri, port), env=server_environment(), stdout=sys.stderr.fileno())
    try:
        _wait_until_healthy(server, address)
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
    """Without the job queue of its agent tools, which starts processes that no run of ours needs."""
    return {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true", **os.environ}


def check_database(tracking_uri: str) -> None:
    """Raise `ConfigError` for a sqlite address whose file does not exist."""
    database = database_file(tracking_uri)
    if database and not database.is_file():
        raise ConfigError(
            f"{database} does not exist: nothing was tracked there yet; "
            f"train something first, or give the --run.storage that runs were written to."
        )


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ConfigError(
                f"port={port} cannot be used ({error.strerror}); choose another, such as {port + 1}."
            ) from None


def _wait_until_healthy(server: subprocess.Popen[bytes], address: str) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise FinhpcError(f"the MLflow server ended with code {server.returncode}; its own message is above.")
        try:
            with urlopen(f"{address}/health", timeout=2) as answer:
                if answer.status == 200:
                    return
        except (URLError, OSError):
            time.sleep(0.2)
    raise FinhpcError(f"the MLflow server did not answer at {address} within {START_S:.0f} s; look at its lines above.")
