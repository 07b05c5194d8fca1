"""Reading MLflow: a database file or a server, and the chosen experiments."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from finhpc.errors import ConfigError
from finhpc.settings.base import nearest
from finhpc.tracking.store import REQUEST_TIMEOUT_S, check_database, unreadable

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment

PAGE = 500  # runs per request


@contextmanager
def open_store(tracking_uri: str) -> Iterator[MlflowClient]:
    """Connect to MLflow.

    Raises `ConfigError` for a database that does not exist or that this version of MLflow cannot read, `FinhpcError`
    for a server that does not answer, at once or later in the block.
    """
    check_database(tracking_uri)
    for name, value in (("MAX_RETRIES", "1"), ("TIMEOUT", REQUEST_TIMEOUT_S)):
        os.environ.setdefault(f"MLFLOW_HTTP_REQUEST_{name}", value)
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        client = MlflowClient(tracking_uri=tracking_uri)
        client.search_experiments(max_results=1)
    except Exception as error:  # of MLflow, of its database's driver, or of the network
        raise unreadable(tracking_uri, error) from None
    try:
        yield client
    except MlflowException as error:
        raise unreadable(tracking_uri, error) from None


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
    """All results of a search of MLflow, page by page."""
    results: list[Any] = []
    token: str | None = None
    while True:
        page = search(**what, max_results=PAGE, page_token=token)
        results += page
        token = page.token
        if not token:
            return results
