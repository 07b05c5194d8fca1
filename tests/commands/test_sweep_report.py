"""What a sweep shows of its trials."""

from __future__ import annotations

from pathlib import Path

import pytest

from finhpc.commands.sweep import plan as sweep_plan
from finhpc.commands.sweep.plan import plan_sweep
from finhpc.commands.sweep.report import flat, ranked
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
    assert [row["rank"] for row in rows] == [None] * 4
    assert "labels" not in capsys.readouterr().err
    assert [row["scored_only"] for row in flat(rows)] == [False, True] * 2
    assert "trained" not in flat(rows)[0], "a number of trainings in the result"
