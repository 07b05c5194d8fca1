from __future__ import annotations

from pathlib import Path

import pytest
import torch

from finhpc.bench import decompose
from finhpc.bench.settings import DecomposeBench
from finhpc.config import build


def test_the_factors_are_the_best_and_both_ratios_are_there(tmp_path: Path) -> None:
    model = {"preset": "gpt2-tiny", "layers": 3, "width": 64}
    tree = {"bench": {"repeats": 2, "out": str(tmp_path)}, "model": model, "blocks": 0, "resources": {"threads": 1}}
    result = decompose.bench_decompose(build(DecomposeBench, tree))
    assert set(result["ratios"]) == {"speedup_over_svd"}
    rows = {row["weight"]: row for row in result["rows"]}
    assert {name: row["weights"] for name, row in rows.items()} == {
        "192 x 64": 3,
        "64 x 64": 3,
        "256 x 64": 3,
        "64 x 256": 3,
        "all 12 of the blocks": 12,
    }
    whole = rows.pop("all 12 of the blocks")
    assert whole["error_over_optimal"] < 1.001
    assert whole["svd_s"] == pytest.approx(sum(3 * row["svd_s"] for row in rows.values()), rel=0.5)


def test_the_plain_way_gives_the_same_factors() -> None:
    weight = decompose.falling((30, 50), 0)
    a, b, values = decompose._svd(weight, 6)
    ours_a, ours_b, ours_values = decompose._ours(weight, 6)
    torch.testing.assert_close(b @ a, ours_b @ ours_a, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(values.double(), ours_values, rtol=3e-3, atol=1e-6)


@pytest.mark.slow
def test_one_and_two_workers(tmp_path: Path) -> None:
    tree = {
        "bench": {"repeats": 1, "out": str(tmp_path)},
        "model": {"preset": "gpt2-tiny", "width": 256},
        "blocks": 2,
        "resources": {"threads": 1},
    }
    result = decompose.bench_decompose(build(DecomposeBench, tree))
    assert result["ratios"]["speedup_2_workers"] > 0
    assert [row["workers"] for row in result["workers"]] == [1, 2]
    assert [path.name for path in tmp_path.iterdir()] == [Path(result["folder"]).name], "models are gone"
