"""Settings of `finhpc report`."""

from __future__ import annotations

from pydantic import Field

from finhpc.settings.base import Section


class Tracked(Section):
    """Where runs were tracked."""

    storage: str = Field("runs", description="folder of run folders, whose mlflow.db is read")
    tracking_uri: str | None = Field(None, description="MLflow server or database; default: sqlite in run.storage")


class ReportConfig(Section):
    """Settings of `finhpc report`."""

    run: Tracked = Field(default_factory=Tracked)
    experiments: list[str] = Field(default_factory=list, description="MLflow experiments; default: all")
    out: str = Field("report", description="folder for the page, its tables and figures; a report in it is replaced")
