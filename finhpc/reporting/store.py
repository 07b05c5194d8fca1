"""Opening what MLflow holds: a database file or a server, and the experiments asked for."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from finhpc.config import nearest
from finhpc.errors import ConfigError, FinhpcError
from finhpc.orchestration.mirror import REQUEST_TIMEOUT_S, database_file
from finhpc.orchestration.runfolder import redact
from finhpc.orchestration.ui import check_database

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment

PAGE = 500  # runs a request


def open_store(tracking_uri: str) -> MlflowClient:
    """A client that MLflow answered.

    Raises `ConfigError` for a database that is not there or that this version of MLflow cannot read, `FinhpcError`
    for a server that does not answer.
    """
    check_database(tracking_uri)
    for name, value in (("MAX_RETRIES", "1"), ("TIMEOUT", REQUEST_TIMEOUT_S)):
        os.environ.setdefault(f"MLFLOW_HTTP_REQUEST_{name}", value)
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    from mlflow import MlflowClient

    try:
        client = MlflowClient(tracking_uri=tracking_uri)
        client.search_experiments(max_results=1)
    except Exception as error:  # of MLflow, of its database's driver, or of the network
        raise _explained(tracking_uri, error) from None
    return client


@contextmanager
def reading(tracking_uri: str) -> Iterator[None]:
    """Tell of a store that stops answering while it is read in one line, as `open_store` does."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        raise _explained(tracking_uri, error) from None


def _explained(tracking_uri: str, error: Exception) -> FinhpcError:
    uri, database, text = redact(tracking_uri), database_file(tracking_uri), str(error)
    if "database schema" in text:
        from mlflow import __version__

        found = re.search(r"found version (\w+), but expected (\w+)", text)
        versions = f" (schema {found[1]}, this one reads {found[2]})" if found else ""
        return ConfigError(
            f"{database or uri} was written by another version of MLflow than the {__version__} here{versions}; keep a "
            f"copy of the database, then run `mlflow db upgrade {uri}`, or use the MLflow that wrote it."
        )
    if database is not None:
        return ConfigError(
            f"{database} is no database that MLflow can read ({_first(error)}); give the one runs went to."
        )
    if uri.startswith(("http://", "https://")):
        return FinhpcError(
            f"the MLflow server at {uri} does not answer ({_first(error)}); start it, or correct the address."
        )
    return ConfigError(
        f"run.tracking_uri={uri} cannot be opened ({_first(error)}); give a server's address or sqlite:////PATH/mlflow.db."
    )


def _first(error: Exception) -> str:
    """The heart of an error on one line, without passwords."""
    text = redact(str(error))
    if "timed out" in text:
        return "no answer in time"
    if found := re.search(r"\[Errno -?\d+\] ([^'\")\]]+)", text):
        return found[1].strip()
    return (text.strip().splitlines() or [type(error).__name__])[0][:160].rstrip(".")


def chosen_experiments(client: MlflowClient, names: list[str]) -> list[Experiment]:
    """The experiments of these names, or all of them; raises `ConfigError` naming those that do not exist."""
    found = {experiment.name: experiment for experiment in _pages(client.search_experiments)}
    unknown = [name for name in names if name not in found]
    if unknown:
        raise ConfigError([f"experiments={name} does not exist; {nearest(name, sorted(found))}" for name in unknown])
    return [found[name] for name in dict.fromkeys(names)] if names else list(found.values())


def all_runs(client: MlflowClient, experiments: list[Experiment]) -> list[Any]:
    """Every active run of the experiments, oldest first."""
    ids = [experiment.experiment_id for experiment in experiments]
    return _pages(client.search_runs, experiment_ids=ids, order_by=["attributes.start_time ASC"])


def _pages(search: Any, **what: Any) -> list[Any]:
    """All that a search of MLflow finds, page by page."""
    found: list[Any] = []
    token: str | None = None
    while True:
        page = search(**what, max_results=PAGE, page_token=token)
        found += page
        token = page.token
        if not token:
            return found
