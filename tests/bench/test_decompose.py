from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from finhpc.bench.measures import decompose
from finhpc.bench.settings import DecomposeBench
from finhpc.errors import ConfigError
from finhpc.lowrank.factorize import residual, truncated_svd
from finhpc.settings.base import build


def settings(folder: Path, **changes: Any) -> DecomposeBench:
    tree = {"bench": {"repeats": 1, "out": str(folder)}, "resources": {"threads": 2}}
    return build(DecomposeBench, tree | changes)


@pytest.mark.slow
def test_all_ways_are_measured_and_every_error_is_the_smallest(tmp_path: Path) -> None:
    result = decompose.bench_decompose(settings(tmp_path, model={"preset": "gpt2-tiny", "width": 64}, blocks=3))
    assert set(result["ratios"]) == {"speedup_over_svd", "speedup_2_workers"}
    rows = {row["weight"]: row for row in result["rows"]}
    assert {name: row["weights"] for name, row in rows.items()} == {
        "192 x 64": 3,
        "64 x 64": 3,
        "256 x 64": 3,
        "64 x 256": 3,
    }
    assert [row["rank"] for row in rows.values()] == ["24", "16", "25", "25"]
    assert max(row["error_over_optimal"] for row in rows.values()) < 1.001
    ways = {row["whole model by"]: row["wall_s"] for row in result["whole"]}
    assert list(ways) == ["torch.linalg.svd", "1 worker", "2 workers"]
    assert min(ways.values()) > 0
    assert [path.name for path in tmp_path.iterdir()] == [Path(result["folder"]).name], "models are gone"


def test_how_far_an_error_is_from_the_smallest() -> None:
    weight = decompose.falling((30, 50), 0)
    a, b = truncated_svd(weight, 6)
    assert decompose.over_optimal(weight, a, b) == pytest.approx(1, abs=1e-4)
    singular = torch.linalg.svdvals(weight.double())
    assert decompose.over_optimal(weight, a, 0 * b) == pytest.approx(
        float(singular.norm() / singular[6:].norm()), rel=1e-4
    )
    assert decompose.over_optimal(weight, *truncated_svd(weight, 30)) == 0


def test_the_plain_way_gives_the_same_product() -> None:
    weight = decompose.falling((30, 50), 0)
    a, b = decompose.cut_svd(weight, 6)
    assert residual(weight, a, b) == pytest.approx(residual(weight, *truncated_svd(weight, 6)), rel=1e-5)


def test_a_rank_that_does_not_fit_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rank=200 does not fit a width of 128; use 1 to 128"):
        decompose.bench_decompose(settings(tmp_path, model={"preset": "gpt2-tiny"}, rank=200))
