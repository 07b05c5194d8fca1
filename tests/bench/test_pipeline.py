"""The pipeline bench on real processes, with a model of milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finhpc.bench.measures.pipeline import bench_pipeline
from finhpc.bench.settings import PipelineBench
from finhpc.errors import ConfigError
from finhpc.settings.base import build

TINY = {"preset": "gpt2-tiny", "vocab_size": 101, "context": 16, "layers": 4, "width": 32, "heads": 4}


def settings(out: Path, **more: Any) -> PipelineBench:
    tree = {"model": TINY, "seq_len": 16, "bench": {"repeats": 1, "out": str(out)}, "resources": {"device": "cpu"}}
    return build(PipelineBench, tree | more)


def test_every_number_of_micro_batches_is_measured_and_drawn(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    result = bench_pipeline(settings(tmp_path, micro_batches=[1, 4], counted=False))
    table = [line for line in capfd.readouterr().err.splitlines() if line and line[0] in "┏┃┡│└"]
    assert len(table) > 5
    assert max(map(len, table)) <= 80
    assert not any("…" in line for line in table), "nothing is cut off"
    rows = result["rows"]
    measured = [("1f1b", 1, 0.5), ("1f1b", 4, 0.8), ("dualpipev", 4, 0.8)]
    assert [(row["schedule"], row["micro_batches"], row["ideal"]) for row in rows] == measured
    for row in rows:
        assert row["over_ideal"] == pytest.approx(row["one_stage_s"] / row["pipeline_s"] / 2 / row["ideal"])
    ratios = {"utilization_over_ideal": rows[1]["over_ideal"], "dualpipev_over_ideal": rows[2]["over_ideal"]}
    assert result["ratios"] == ratios
    assert (Path(result["folder"]) / "pipeline.png").stat().st_size > 5000


def test_more_stages_than_blocks_are_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="stages=5 does not fit 4 transformer blocks; use 2 to 4"):
        bench_pipeline(settings(tmp_path, stages=5))


def test_too_few_micro_batches_for_dualpipev_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs 2 x stages = 4 micro-batches or more, but the largest of .* is 3"):
        bench_pipeline(settings(tmp_path, micro_batches=[1, 3]))
