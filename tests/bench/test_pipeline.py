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


def test_every_number_of_micro_batches_is_measured_and_drawn(tmp_path: Path) -> None:
    result = bench_pipeline(settings(tmp_path, micro_batches=[1, 3], counted=False))
    assert [row["micro_batches"] for row in result["rows"]] == [1, 3]
    assert [row["ideal"] for row in result["rows"]] == [0.5, 0.75]
    for row in result["rows"]:
        assert row["over_ideal"] == pytest.approx(row["one_stage_s"] / row["pipeline_s"] / 2 / row["ideal"])
    assert result["ratios"] == {"utilization_over_ideal": result["rows"][1]["over_ideal"]}
    assert (Path(result["folder"]) / "pipeline.png").stat().st_size > 5000


def test_more_stages_than_blocks_are_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="stages=5 does not fit 4 transformer blocks; use 2 to 4"):
        bench_pipeline(settings(tmp_path, stages=5))
