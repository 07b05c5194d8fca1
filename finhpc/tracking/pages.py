"""Addresses of MLflow's pages: a sweep's comparison, and the list of runs with its main metric."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from finhpc.errors import ConfigError
from finhpc.settings.base import nearest
from finhpc.tracking.shown import LEADING, PARENT, SWEEP
from finhpc.tracking.store import VIEW, database_file, has_content, set_up_client, unreadable

if TYPE_CHECKING:
    from mlflow import MlflowClient

COMPARED = 100  # runs on one comparison page; more are slow to draw and hard to read
RECENT = 1000  # runs that are looked through
Pages = list[tuple[str, str]]  # what is there, and where below the server's address


def pages_of(tracking_uri: str, name: str | None) -> Pages:
    """The pages worth opening: the comparison of a sweep or an evaluation, and the list of its experiment's runs.

    `name`: of a run, a sweep or an evaluation; by default the newest that compares something. Raises `ConfigError` for
    a name that no run has and a store that cannot be read.
    """
    database = database_file(tracking_uri)
    if database is not None and not has_content(database):
        return []
    set_up_client()
    from mlflow import MlflowClient

    try:
        client = MlflowClient(tracking_uri=tracking_uri)  # it opens the database
        experiments = {found.experiment_id: found for found in client.search_experiments()}
        runs = list(client.search_runs(list(experiments), max_results=RECENT, order_by=["attributes.start_time DESC"]))
    except Exception as error:  # of MLflow, of its database's driver, or of the network
        raise unreadable(tracking_uri, error) from None
    chosen = _named(runs, name) if name else next((run for run in runs if _children(runs, run)), None)
    if chosen is None:
        alone = [run for run in runs if PARENT not in run.data.tags]
        found = _comparison("the experiment", [run for run in alone if run.info.experiment_id == _newest(alone)])
    else:
        children = _children(runs, chosen) or list(_all_children(client, chosen))
        found = _comparison(chosen.info.run_name, children) or [(f"run {chosen.info.run_name}", _run_page(chosen))]
    experiment = chosen.info.experiment_id if chosen else _newest(runs)
    if experiment is not None and f"mlflow.sharedViewState.{VIEW}" in experiments[experiment].tags:
        found.append((f"all runs of {experiments[experiment].name}", f"#/experiments/{experiment}/runs?{_VIEWED}"))
    return found


_VIEWED = f"viewStateShareKey={VIEW}"


def _named(runs: list[Any], name: str) -> Any:
    found = next((run for run in runs if run.info.run_name == name), None)
    if found is None:
        names = list(dict.fromkeys(run.info.run_name for run in runs if PARENT not in run.data.tags))
        raise ConfigError(f"run.name={name} is not the name of a run in MLflow; {nearest(name, names)}")
    return found


def _newest(runs: list[Any]) -> str | None:
    return str(runs[0].info.experiment_id) if runs else None


def _children(runs: list[Any], parent: Any) -> list[Any]:
    return [run for run in runs if run.data.tags.get(PARENT) == parent.info.run_id]


def _all_children(client: MlflowClient, parent: Any) -> list[Any]:
    below = f"tags.`{PARENT}` = '{parent.info.run_id}'"
    return list(client.search_runs([parent.info.experiment_id], below, max_results=RECENT))


def _comparison(title: str, runs: list[Any]) -> Pages:
    """The page that compares those of the runs that finished; nothing for fewer than two.

    Runs that lack a metric would take it from the page, as it offers those that all have.
    """
    done = [run for run in runs if run.info.status == "FINISHED" and run.data.metrics]
    done = [run for run in done if SWEEP in run.data.tags] or done  # without the model that a sweep's trials start from
    leading = next((key for key in LEADING if any(key in run.data.metrics for run in done)), None)
    if leading is not None:
        done = sorted((run for run in done if leading in run.data.metrics), key=lambda run: run.data.metrics[leading])
    if len(done) < 2:
        return []
    ids = [run.info.run_id for run in done[:COMPARED]]
    experiments = sorted({run.info.experiment_id for run in done[:COMPARED]})
    what = f"compare the {'best ' if len(done) > COMPARED else ''}{len(ids)} runs of {title}"
    return [(what, f"#/compare-runs?runs={_json(ids)}&experiments={_json(experiments)}")]


def _run_page(run: Any) -> str:
    return f"#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"


def _json(values: list[str]) -> str:
    return quote(json.dumps(values, separators=(",", ":")), safe="")
