"""Settings of `finhpc report` and `finhpc ui`, which show what was tracked."""

from __future__ import annotations

from pydantic import Field

from finhpc.settings.base import Section
from finhpc.settings.training import Tracked


class ReportConfig(Section):
    """Settings of `finhpc report`."""

    run: Tracked = Field(default_factory=Tracked)
    experiments: list[str] = Field(default_factory=list, description="MLflow experiments to show; default: all")
    out: str = Field("report", description="folder for the page, tables and figures; replaces an earlier report")


class Shown(Tracked):
    """What `finhpc ui` shows."""

    name: str | None = Field(
        None, description="run, sweep or evaluation to open; default: the newest one with runs to compare"
    )


class UiConfig(Section):
    """Settings of `finhpc ui`."""

    run: Shown = Field(default_factory=Shown)
    port: int = Field(5000, ge=1, le=65535, description="port of the page on 127.0.0.1")
