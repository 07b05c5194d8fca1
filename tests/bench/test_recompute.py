"""The recomputation bench on real passes, with a model of milliseconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from finhpc.bench.measures.recompute import bench_recompute
from finhpc.bench.settings import RecomputeBench
from finhpc.settings.base import build

TINY = {"preset": "gpt2-tiny", "vocab_size": 101, "context": 256, "layers": 2, "width": 64, "heads": 4}


def test_every_mode_is_measured_beside_none(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    tree: dict[str, Any] = {
        "model": TINY,
        "seq_len": 256,
        "bench": {"repeats": 2, "out": str(tmp_path)},
        "resources": {"device": "cpu", "threads": threads},
    }
    result = bench_recompute(build(RecomputeBench, tree))
    none, attention, full = result["rows"]
    assert [row["recompute"] for row in result["rows"]] == ["none", "attention", "full"]
    assert none["over_none"] == 1
    assert result["ratios"] == {
        "time_attention_over_none": attention["over_none"],
        "time_full_over_none": full["over_none"],
    }
    assert none["saved_bytes_per_block"] > attention["saved_bytes_per_block"] > full["saved_bytes_per_block"]
    assert full["saved_bytes_per_block"] == 256 * 64 * 4 + 256 * 8
    assert full["removed"] == pytest.approx(1 - full["saved_bytes_per_block"] / none["saved_bytes_per_block"])
    assert none["peak_memory_bytes"] > attention["peak_memory_bytes"]
    assert json.loads((Path(result["folder"]) / "result.json").read_text())["ratios"] == result["ratios"]
