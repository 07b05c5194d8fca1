"""Where MLflow keeps runs: a sqlite file of this machine's, or a server; and why one of them cannot be read."""

from __future__ import annotations

import fcntl
import os
import re
import shlex
from pathlib import Path

from finhpc.errors import ConfigError, FinhpcError
from finhpc.orchestration.runfolder import redact


def database_file(tracking_uri: str) -> Path | None:
    """The file of a sqlite address; None for a server."""
    if not tracking_uri.startswith("sqlite:///"):
        return None
    return Path(tracking_uri.removeprefix("sqlite:///"))


def artifact_location(tracking_uri: str) -> str | None:
    """Where a sqlite database's artifacts lie: beside it. A server decides for itself."""
    database = database_file(tracking_uri)
    return str(database.parent / "mlartifacts") if database else None


def make_database(tracking_uri: str) -> None:
    """Build a new sqlite database aside and move it into place.

    MLflow builds its tables for seconds at the first use. A second process that looks in meanwhile, or a
    kill, leaves a database that nothing can open.
    """
    if (path := database_file(tracking_uri)) is None or has_content(path):
        return
    from mlflow import MlflowClient

    with open(path.with_name(f".{path.name}.lock"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if has_content(path):  # another run was first
            return
        draft = path.with_name(f".{path.name}.draft")
        draft.unlink(missing_ok=True)
        MlflowClient(f"sqlite:///{draft}").search_experiments(max_results=1)
        draft.chmod(0o600)
        os.rename(draft, path)


def has_content(path: Path) -> bool:
    """sqlite makes an empty file of what it does not find."""
    return path.exists() and path.stat().st_size > 0


def identity(tracking_uri: str) -> tuple[int, int] | None:
    path = database_file(tracking_uri)
    if path is None or not path.exists():
        return None
    found = path.stat()
    return found.st_dev, found.st_ino


def unreadable(tracking_uri: str, error: Exception) -> FinhpcError:
    """What MLflow raised of a database or a server, in one line with what to do about it."""
    uri, database, text = redact(tracking_uri), database_file(tracking_uri), str(error)
    if "database schema" in text:
        from mlflow import __version__

        found = re.search(r"found version (\w+), but expected (\w+)", text)
        versions = f" (schema {found[1]}, this one reads {found[2]})" if found else ""
        return ConfigError(
            f"{database or uri} was written by another version of MLflow than the {__version__} here{versions}; keep a "
            f"copy of the database, then run `mlflow db upgrade {shlex.quote(uri)}`, or use the MLflow that wrote it."
        )
    if database is not None:
        return ConfigError(
            f"{database} is no database that MLflow can read ({reason(error)}); give the one runs went to."
        )
    if uri.startswith(("http://", "https://")):
        return FinhpcError(
            f"the MLflow server at {uri} does not answer ({reason(error)}); start it, or correct the address."
        )
    return ConfigError(
        f"run.tracking_uri={uri} cannot be opened ({reason(error)}); give a server's address or sqlite:////PATH/mlflow.db."
    )


def reason(error: Exception) -> str:
    """The heart of an error of MLflow or the network on one line, without addresses and passwords."""
    text = redact(str(error))
    if "timed out" in text:
        return "no answer in time"
    if found := re.search(r"\[Errno -?\d+\] ([^'\")\]]+)", text):
        return found[1].strip()
    return (text.strip().splitlines() or [type(error).__name__])[0][:160].rstrip(".")
