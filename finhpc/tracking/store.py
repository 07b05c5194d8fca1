"""Where MLflow stores runs: a sqlite file on this machine or a server; and why one cannot be used."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from finhpc.errors import ConfigError, FinhpcError
from finhpc.files import redact

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

REQUEST_TIMEOUT_S = "10"
REFUSALS = re.compile(r"PERMISSION_DENIED|UNAUTHENTICATED|error code 40[13]\b|readonly database|Read-only file system")
PRIMARY = "val_loss"
VIEW = "finhpc"  # the saved view of the list of runs, opened by its name in the address
EXPERIMENT_TAGS = {
    # The kind makes the page show losses and parameters, not chats.
    "mlflow.experimentKind": "custom_model_development",
    "mlflow.experiment.primaryMetric.name": PRIMARY,
    f"mlflow.sharedViewState.{VIEW}": json.dumps(
        {
            "selectedColumns": [
                "attributes.`Dataset`",
                *(f"metrics.`{key}`" for key in (PRIMARY, "held_out_weighted_f1")),
                *(f"metrics.`evaluate/{task}/weighted_f1`" for task in ("fpb", "fiqa_sa", "tfns", "ner")),
            ]
        }
    ),
}


class RefusedError(ConfigError):
    """A store that does not accept a run; trying again does not help."""


def set_up_client() -> None:
    """Configure MLflow, before it is imported: how long it waits and what it prints."""
    # Short waits and no retries: the tracker's thread retries anyway, and must notice the run's end.
    for name, value in (("MAX_RETRIES", "0"), ("TIMEOUT", REQUEST_TIMEOUT_S)):
        os.environ.setdefault(f"MLFLOW_HTTP_REQUEST_{name}", value)
    # A pool would keep a database open that was deleted and created again.
    os.environ.setdefault("MLFLOW_SQLALCHEMYSTORE_POOLCLASS", "NullPool")
    # MLflow prints addresses on stdout, which belongs to results.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")


def check_store(tracking_uri: str, experiment: str) -> None:
    """Raise `ConfigError`, before anything starts, for a store that does not accept runs of this experiment.

    That is a database that cannot be read or written, a server that refuses, an experiment that was deleted. A server
    that does not answer is accepted: what it misses is sent later.
    """
    database = database_file(tracking_uri)
    if database is not None:
        _check_writable(database)
        if not has_content(database):
            return
    set_up_client()
    from mlflow import MlflowClient

    try:
        known = MlflowClient(tracking_uri=tracking_uri).get_experiment_by_name(experiment)
    except Exception as error:  # from MLflow, its database driver or the network
        if "database is locked" in str(error) or (database is None and not refuses(error)):
            return
        raise unreadable(tracking_uri, error) from None
    if known is not None and known.lifecycle_stage == "deleted":
        raise deleted(tracking_uri, experiment, known.experiment_id)


def check_database(tracking_uri: str) -> None:
    """Raise `ConfigError` for a sqlite address whose file does not exist."""
    database = database_file(tracking_uri)
    if database and not database.is_file():
        raise ConfigError(
            f"{database} does not exist: nothing was tracked there yet; "
            f"train something first, or give the --run.storage that runs were written to."
        )


def _check_writable(database: Path) -> None:
    """Raise `ConfigError` unless the database, or a new one in its folder, can be written."""
    folder = next(path for path in database.parents if path.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):  # sqlite writes its journal next to the database
            pass
        if has_content(database):
            with closing(sqlite3.connect(f"file:{quote(str(database))}?mode=rw", uri=True, timeout=0)) as connection:
                connection.execute("BEGIN IMMEDIATE")
                connection.rollback()
    except (OSError, sqlite3.Error) as error:
        if "is locked" in str(error):  # for a moment, by another run
            return
        raise RefusedError(
            f"{database} cannot be written ({reason(error)}); correct its permissions, or give another "
            "--run.tracking_uri."
        ) from None


def refuses(error: Exception) -> bool:
    """Whether an error is a refusal, which trying again does not change."""
    text = f"{getattr(error, 'error_code', '')} {error}"
    return isinstance(error, RefusedError) or REFUSALS.search(text) is not None


def deleted(tracking_uri: str, experiment: str, experiment_id: str) -> RefusedError:
    uri = redact(tracking_uri)
    return RefusedError(
        f"run.experiment={experiment} was deleted in MLflow; restore it (MLFLOW_TRACKING_URI={uri} mlflow experiments "
        f"restore --experiment-id {experiment_id}), or choose another --run.experiment."
    )


def experiment_id(client: MlflowClient, tracking_uri: str, name: str) -> str:
    """The id of the experiment of this name, created if there is none; raises `RefusedError` if it was deleted."""
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return str(client.create_experiment(name, artifact_location(tracking_uri), EXPERIMENT_TAGS))
        except MlflowException:  # another run was first
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
    if experiment.lifecycle_stage == "deleted":
        raise deleted(tracking_uri, name, experiment.experiment_id)
    return str(experiment.experiment_id)


def database_file(tracking_uri: str) -> Path | None:
    """The file of a sqlite address; None for a server."""
    if not tracking_uri.startswith("sqlite:///"):
        return None
    return Path(tracking_uri.removeprefix("sqlite:///"))


def artifact_location(tracking_uri: str) -> str | None:
    """Where a sqlite database's artifacts are: next to it. A server decides for itself."""
    database = database_file(tracking_uri)
    return str(database.parent / "mlartifacts") if database else None


def create_database(tracking_uri: str) -> None:
    """Create a new sqlite database under another name and move it into place.

    MLflow creates its tables for seconds at the first use. A second process that opens it meanwhile, or a kill, would
    leave a database that nothing can open.
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
    """Whether a database exists; sqlite creates an empty file for one that does not."""
    return path.exists() and path.stat().st_size > 0


def identity(tracking_uri: str) -> tuple[int, int] | None:
    path = database_file(tracking_uri)
    if path is None or not path.exists():
        return None
    stat = path.stat()
    return stat.st_dev, stat.st_ino


def active_run(client: MlflowClient, run_id: str | None) -> Run | None:
    """The run of this id; None if there is none or it was deleted."""
    from mlflow.exceptions import MlflowException

    if run_id is None:
        return None
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return run if run.info.lifecycle_stage == "active" else None


def unreadable(tracking_uri: str, error: Exception) -> FinhpcError:
    """An error of MLflow about a database or a server, in one line with the remedy."""
    uri, database, text = redact(tracking_uri), database_file(tracking_uri), str(error)
    if "database schema" in text:
        from mlflow import __version__

        match = re.search(r"found version (\w+), but expected (\w+)", text)
        versions = f" (schema {match[1]}, this one reads {match[2]})" if match else ""
        return ConfigError(
            f"{database or uri} was written by another version of MLflow than the {__version__} here{versions}; keep a "
            f"copy of the database, then run `mlflow db upgrade {shlex.quote(uri)}`, or use the MLflow that wrote it."
        )
    if database is not None:
        return ConfigError(
            f"{database} is not a database that MLflow can read ({reason(error)}); give the one with your runs."
        )
    if uri.startswith(("http://", "https://")) and refuses(error):
        return RefusedError(
            f"the MLflow server at {uri} refuses ({reason(error)}); set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, to those of a user who may write there."
        )
    if uri.startswith(("http://", "https://")):
        return FinhpcError(
            f"the MLflow server at {uri} does not answer ({reason(error)}); start it, or correct the address."
        )
    return ConfigError(
        f"run.tracking_uri={uri} cannot be opened ({reason(error)}); give a server's address or sqlite:////PATH/mlflow.db."
    )


def reason(error: Exception) -> str:
    """An error of MLflow or the network in one line, without addresses and passwords."""
    text = redact(str(error))
    if "timed out" in text:
        return "no answer in time"
    if match := re.search(r"\[Errno -?\d+\] ([^'\")\]]+)", text):
        return match[1].strip()
    return (text.strip().splitlines() or [type(error).__name__])[0][:160].rstrip(".")
