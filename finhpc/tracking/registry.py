"""Runs below a parent run, and models in MLflow's registry."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from finhpc.tracking.store import RefusedError, active_run
from finhpc.tracking.tags import PARENT

if TYPE_CHECKING:
    from mlflow import MlflowClient

BEST = "best"  # the alias of a registered model


def settle_children(tracking_uri: str, parent: str | None, children: list[tuple[str, str]]) -> None:
    """Put runs (id, status) below the parent; those that a killed process left RUNNING get their status.

    Runs that were deleted in MLflow are left alone. Raises `MlflowException` if MLflow does not answer.
    """
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=tracking_uri)
    for run_id, status in children:
        run = active_run(client, run_id)
        if run is None:
            continue
        if parent and run.data.tags.get(PARENT) != parent:
            client.set_tag(run_id, PARENT, parent)
        if run.info.status == "RUNNING":
            client.set_terminated(run_id, status=status)


def register(tracking_uri: str, name: str, run_id: str, model: Path, steps: int) -> str:
    """Make the model folder a version of `name` in the registry, with the alias `best`; return its address.

    A run is registered once. Raises `RefusedError` for a run that was deleted in MLflow.
    """
    from mlflow import MlflowClient

    from finhpc.tracking.pyfunc import log_model

    client = MlflowClient(tracking_uri=tracking_uri)
    run = active_run(client, run_id)
    if run is None:
        raise RefusedError(
            f"the run of the best trial was deleted in MLflow, so nothing is registered as {name}; restore it "
            f"(mlflow runs restore --run-id {run_id}), then run the same command again."
        )
    if not client.search_registered_models(filter_string=f"name = '{name}'"):
        client.create_registered_model(name, description="The best models of finhpc sweeps.")
    versions = [v for v in client.search_model_versions(f"name = '{name}'") if v.run_id == run_id]
    if versions:
        version = versions[0].version
    else:
        ids = _logged_models(client, run_id)
        if not ids:
            log_model(client, run_id, model, step=steps)
            ids = _logged_models(client, run_id)
        source = client.get_logged_model(ids[-1]).artifact_location  # models:/ID would be looked up elsewhere
        version = client.create_model_version(name, source, run_id=run_id, model_id=ids[-1]).version
    client.set_registered_model_alias(name, BEST, version)
    return f"models:/{name}@{BEST}"


def _logged_models(client: MlflowClient, run_id: str) -> list[str]:
    """The ids of a run's models, without those that were deleted in MLflow; in any order."""
    from mlflow.exceptions import MlflowException

    ids = []
    outputs = client.get_run(run_id).outputs
    for output in outputs.model_outputs if outputs else []:
        with suppress(MlflowException):  # deleted
            client.get_logged_model(output.model_id)
            ids.append(output.model_id)
    return ids
