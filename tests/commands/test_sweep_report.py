"""What a sweep shows of its trials."""

from __future__ import annotations

from pathlib import Path

import pytest

from finhpc.commands.sweep import plan as sweep_plan
from finhpc.commands.sweep.plan import plan_sweep
from finhpc.commands.sweep.report import flat, ranked
from finhpc.runs.folder import RunFolder
from finhpc.settings.base import build
from finhpc.settings.sweep import SweepConfig


def test_a_pretraining_sweep_without_losses_says_nothing_of_labels(
    run_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweep_plan, "known_resources", lambda: None)  # no times are estimated
    tree = {
        "model": {"preset": "gpt2-tiny", "layers": 2, "width": 32},
        "data": {"shards": str(run_shards), "seq_len": 32},
        "run": {"name": "ranks", "storage": str(tmp_path)},
        "grid": {"method.rank": [4, 8], "quantization.bits": [16, 4]},
    }
    rows = ranked(plan_sweep(build(SweepConfig, tree), tmp_path / "ranks"))
    assert [row["place"] for row in rows] == [None] * 4
    assert "labels" not in capsys.readouterr().err
    assert [row["scored_only"] for row in flat(rows)] == [False, True] * 2
    assert "trained" not in flat(rows)[0], "a number of trainings in the result"


def test_a_rank_that_makes_the_model_larger_is_noted_once(run_shards: Path, tmp_path: Path) -> None:
    tree = {
        "model": {"preset": "gpt2-tiny", "layers": 2, "width": 32},
        "data": {"shards": str(run_shards), "seq_len": 32},
        "run": {"name": "ranks", "storage": str(tmp_path)},
        "grid": {"method.rank": [4, 32], "train.seed": [0, 1]},
    }
    (note,) = plan_sweep(build(SweepConfig, tree), tmp_path / "ranks").notes
    assert note.startswith("method.rank=32: 0.")
    assert note.endswith(" x, larger than the dense model; a lower method.rank makes it smaller")


def test_the_settings_of_a_sweep_are_stored_without_passwords(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "ranks")
    folder.path.mkdir()
    folder.write_settings(build(SweepConfig, {"run": {"tracking_uri": "http://me:secret@host:5000"}}))
    stored = (folder.path / "config.yaml").read_text()
    assert "host:5000" in stored
    assert "secret" not in stored
