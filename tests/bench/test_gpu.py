"""The prepared measurement of one GPU, with models of milliseconds on a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finhpc.bench.measures.gpu import bench_gpu, ratios
from finhpc.bench.settings import GpuBench
from finhpc.settings.base import build

TINY: dict[str, Any] = {
    "pretrain": ["gpt2-tiny", "gpt2-tiny:8"],
    "finetune": ["llama-tiny"],
    "bits": [16, 4],
    "generate": [],
    "ways": ["plain", "eager"],
    "batch": 2,
    "seq_len": 32,
    "examples": 4,
    "steps": 2,
    "warm_up": 1,
    "resources": {"device": "cpu", "threads": 1},
}


def measured(folder: Path, **more: Any) -> dict[str, Any]:
    result = bench_gpu(build(GpuBench, TINY | {"bench": {"out": str(folder)}} | more))
    assert result == json.loads((Path(result["folder"]) / "result.json").read_text())
    return result


def test_every_case_has_figures_or_its_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = measured(tmp_path, generate=["no-shape:4"])
    *rows, failed = result["rows"]
    assert [(row["part"], row["model"], row["way"]) for row in rows] == [
        *((("pretrain", model, way)) for model in TINY["pretrain"] for way in TINY["ways"]),
        *((f"lora {bits} bits", "llama-tiny", way) for bits in TINY["bits"] for way in TINY["ways"]),
    ]
    assert all(row["error"] is None and row["tokens_per_s"] > 0 for row in rows)
    assert all((row["predicted_bytes"] is None) == (row["way"] == "plain") for row in rows)
    assert "no-shape is not a preset" in failed["error"]
    assert failed["tokens_per_s"] is None
    assert result["ratios"] == ratios(rows)
    assert len(result["ratios"]) == 4
    assert result["status"] == "finished"


def test_nothing_begins_after_the_time_is_up(tmp_path: Path) -> None:
    result = measured(tmp_path, budget_s=0.0)
    assert {row["error"] for row in result["rows"]} == {"no time left"}
    assert len(result["rows"]) == 8
