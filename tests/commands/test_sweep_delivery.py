"""What is sent again at a sweep's end, and when that is given up; test_sweep_faults sends it to a real server."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finhpc.commands.sweep import tracking
from finhpc.errors import ConfigError


def plan(folder: Path) -> Any:
    """Three trials that ended; MLflow was told of the first alone."""
    for name, ended in {"told": "FINISHED at step 3", "one": None, "two": None}.items():
        (folder / name).mkdir()
        (folder / name / "trial.json").write_text(json.dumps({"status": "finished"}))
        (folder / name / "mlflow.json").write_text(json.dumps({"ended": ended}))
    return SimpleNamespace(
        trials=[SimpleNamespace(name=name) for name in ("told", "one", "two")],
        run_folder=lambda name: folder / name,
        arguments=lambda trial, parent: None,
    )


def test_a_server_that_stays_away_is_waited_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried: list[str] = []
    monkeypatch.setattr(tracking, "_send", lambda run, arguments: tried.append(run.name))
    tracking.send_missed(plan(tmp_path), None)
    assert tried == ["one"], "each would wait a minute"
    assert "the same command sends the rest" in capsys.readouterr().err


def test_a_trial_whose_data_is_gone_takes_no_other_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried: list[str] = []

    def gone(run: Path, arguments: Any) -> None:
        tried.append(run.name)
        raise ConfigError("data.shards=there is no folder.")

    monkeypatch.setattr(tracking, "_send", gone)
    tracking.send_missed(plan(tmp_path), None)
    assert tried == ["one", "two"]
    assert "trial two was not sent: data.shards=there is no folder." in capsys.readouterr().err
