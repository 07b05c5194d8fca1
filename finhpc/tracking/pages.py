"""Addresses of MLflow's pages: a sweep's comparison, and the list of runs with its main metric."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

from finhpc.errors import ConfigError
from finhpc.settings.base import nearest
from finhpc.tracking.metrics import LEADING
from finhpc.tracking.store import VIEW, database_file, has_content, set_up_client, unreadable
from finhpc.tracking.tags import PARENT, SWEEP

COMPARED = 100  # runs on one comparison page; more are slow to draw and hard to read
RECENT = 1000  # runs that are searched
Pages = list[tuple[str, str]]  # title, and path below the server's address


def pages_of(tracking_uri: str, name: str | None) -> Pages:
    """The comparison page of a sweep or an evaluation, and the list of its experiment's runs.

    `name`: of a run, a sweep or an evaluation; by default the newest one with runs to compare. Raises `ConfigError` if
    no run has that name or the store cannot be read.
    """
    database = database_file(tracking_uri)
    if database is not None and not has_content(database):
        return []
    set_up_client()
    from mlflow import MlflowClient

    try:
        client = MlflowClient(tracking_uri=tracking_uri)  # it opens the database
        experiments = {experiment.experiment_id: experiment for experiment in client.search_experiments()}
        runs = list(client.search_runs(list(experiments), max_results=RECENT, order_by=["attributes.start_time DESC"]))
    except Exception as error:  # from MLflow, its database driver or the network
        raise unreadable(tracking_uri, error) from None
    parents = {run.data.tags[PARENT] for run in runs if PARENT in run.data.tags}
    chosen = _named(runs, name) if name else next((run for run in runs if run.info.run_id in parents), None)
    if chosen is not None:
        experiment = chosen.info.experiment_id
        below = f"tags.`{PARENT}` = '{chosen.info.run_id}'"
        children = list(client.search_runs([experiment], below, max_results=RECENT))
        title, own_page = chosen.info.run_name, f"#/experiments/{experiment}/runs/{chosen.info.run_id}"
        pages = _comparison(title, children) or [(f"run {title}", own_page)]
    else:
        alone = [run for run in runs if PARENT not in run.data.tags]
        experiment = next((run.info.experiment_id for run in alone or runs), None)
        pages = _comparison("the experiment", [run for run in alone if run.info.experiment_id == experiment])
    if experiment is not None and f"mlflow.sharedViewState.{VIEW}" in experiments[experiment].tags:
        page = f"#/experiments/{experiment}/runs?viewStateShareKey={VIEW}"
        pages.append((f"all runs of {experiments[experiment].name}", page))
    return pages


def _named(runs: list[Any], name: str) -> Any:
    for run in runs:
        if run.info.run_name == name:
            return run
    names = list(dict.fromkeys(run.info.run_name for run in runs if PARENT not in run.data.tags))
    raise ConfigError(f"run.name={name} is not the name of a run in MLflow; {nearest(name, names)}")


def _comparison(title: str, runs: list[Any]) -> Pages:
    """The page that compares the finished runs; none for fewer than two.

    It offers only metrics that all runs have, so runs without the leading metric are left out.
    """
    done = [run for run in runs if run.info.status == "FINISHED" and run.data.metrics]
    done = [run for run in done if SWEEP in run.data.tags] or done  # not the model that a sweep's trials start from
    leading = next((key for key in LEADING if any(key in run.data.metrics for run in done)), None)
    if leading is not None:
        done = sorted((run for run in done if leading in run.data.metrics), key=lambda run: run.data.metrics[leading])
    if len(done) < 2:
        return []
    ids = [run.info.run_id for run in done[:COMPARED]]
    experiments = sorted({run.info.experiment_id for run in done[:COMPARED]})
    what = f"compare the {'best ' if len(done) > COMPARED else ''}{len(ids)} runs of {title}"
    return [(what, f"#/compare-runs?runs={_json(ids)}&experiments={_json(experiments)}")]


def _json(values: list[str]) -> str:
    return quote(json.dumps(values, separators=(",", ":")), safe="")
