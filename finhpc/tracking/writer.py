"""The one way to write to an MLflow run: within the limits of a request, and without passwords."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from finhpc.files import redact
from finhpc.tracking.describe import Dataset

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

METRICS_PER_REQUEST = 1000  # MLflow's limits
ITEMS_PER_REQUEST = 100  # parameters or tags
PARAM_LENGTH = 6000
TAG_LENGTH = 8000


class RunWriter:
    """Writes to the run `run_id`. Each call may raise, and can be repeated: equal values are stored once."""

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self.client, self.run_id = client, run_id

    def describe(self, params: Mapping[str, Any], tags: Mapping[str, Any], datasets: Sequence[Dataset] = ()) -> None:
        """Log what the run is: its parameters, tags and datasets.

        MLflow keeps a parameter's first value; one that a resumed run changed becomes a tag as well.
        """
        from mlflow.entities import Param

        values = {key: redact(str(value))[:PARAM_LENGTH] for key, value in params.items()}
        known = self.client.get_run(self.run_id).data.params
        new = [Param(key, value) for key, value in values.items() if key not in known]
        for begin in range(0, len(new), ITEMS_PER_REQUEST):
            self.client.log_batch(self.run_id, params=new[begin : begin + ITEMS_PER_REQUEST])
        changed = {f"now.{key}": value for key, value in values.items() if known.get(key, value) != value}
        self.log(tags={**tags, **changed})
        if datasets:
            self.client.log_inputs(self.run_id, [dataset.entity() for dataset in datasets])

    def log(self, metrics: Sequence[Metric] = (), tags: Mapping[str, Any] | None = None) -> None:
        from mlflow.entities import RunTag

        all_tags = [RunTag(key, redact(str(value))[:TAG_LENGTH]) for key, value in (tags or {}).items()]
        for begin in range(0, len(all_tags), ITEMS_PER_REQUEST):
            self.client.log_batch(self.run_id, tags=all_tags[begin : begin + ITEMS_PER_REQUEST])
        for begin in range(0, len(metrics), METRICS_PER_REQUEST):
            self.client.log_batch(self.run_id, metrics=metrics[begin : begin + METRICS_PER_REQUEST])

    def log_figures(self, figures: Iterable[tuple[str, float]], step: int = 0) -> None:
        """Log metrics of one moment, in this order."""
        from mlflow.entities import Metric

        now = round(time.time() * 1000)
        self.log([Metric(name, float(value), now, step) for name, value in figures])
