"""Names of the tags that finhpc sets on MLflow's runs and reads again.

MLflow's pages do not list tags below `mlflow.`; unlike parameters, tags can change when a run resumes.
"""

from __future__ import annotations

from typing import Any

from finhpc.settings.base import Section, flatten

PREFIX = "mlflow.finhpc."
SETTING = PREFIX + "setting."
COMMAND = PREFIX + "command"  # that made the run
SCORED_FROM = PREFIX + "scored_from"  # id of the run whose model this run scores
PARENT = "mlflow.parentRunId"
SWEEP = "finhpc.sweep"  # the sweep's name, on every run of it


def setting_tags(config: Section) -> dict[str, Any]:
    """A tag for each setting."""
    return {SETTING + key: value for key, value in flatten(config).items()}
