"""The train bench on real processes, with a model of milliseconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from finhpc.bench.measures.overhead import overhead
from finhpc.bench.measures.train import bench_train, operations, run_config
from finhpc.bench.profile import REST, kind_of, profiled
from finhpc.bench.settings import TrainBench
from finhpc.bench.shards import VOCAB
from finhpc.errors import ConfigError, TrainingFailedError
from finhpc.lowrank.replace import ranks_of
from finhpc.models.families.registry import make_config, resolve_shape
from finhpc.settings.base import build
from tests.training.processes import run_processes

TINY = {"preset": "gpt2-tiny", "vocab_size": 101, "context": 32, "layers": 2, "width": 32, "heads": 4}


def settings(out: Path, **more: Any) -> TrainBench:
    tree: dict[str, Any] = {
        "model": TINY,
        "ranks": [4, 2],
        "batch": 2,
        "seq_len": 16,
        "compiled": False,
        "bench": {"repeats": 1, "out": str(out)},
        "overhead_pairs": 1,
        "overhead_steps": 8,
        "resources": {"device": "cpu"},
    }
    return build(TrainBench, tree | more)


def _bench(out: Path) -> dict[str, Any]:
    return bench_train(settings(out, ray=False))


def test_every_way_is_measured_beside_every_other(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (result,) = run_processes(_bench, 1, tmp_path)
    printed = "".join(capfd.readouterr())
    assert not [noise for noise in ("accelerator", "SEED_LAYERS", "topology", "loss_type") if noise in printed]
    names = {"speedup_over_limit_fp32", "overhead_fp32", "speedup_over_limit_bf16", "overhead_bf16"}
    assert set(result["ratios"]) == names
    assert len(result["rows"]) == 2 * 6
    assert len({tuple(row) for row in result["rows"]}) == 1, "the same keys in each"
    for row in result["rows"]:
        assert row["speedup_over_limit"] == pytest.approx(row["speedup"] / row["limit"]), row["way"]
        assert row["tokens_per_s"] == pytest.approx(2 * 16 / row["step_s"])
    dense = [row for row in result["rows"] if row["way"].startswith("dense")]
    assert [row["limit"] for row in dense] == [1.0] * 4
    assert min(abs(row["speedup"] - 1) for row in dense) == 0, "the fastest dense one is what others are compared with"
    ways = {row["way"] for row in result["profile"]}
    assert ways == {row["way"] for row in result["rows"] if not row["way"].startswith("rank 2")}
    for row in result["profile"]:
        shares = [value for value in row.values() if isinstance(value, float)]
        assert sum(shares) == pytest.approx(1)
    assert json.loads((Path(result["folder"]) / "result.json").read_text())["ratios"] == result["ratios"]


def test_operations_are_those_of_the_matrices_and_of_attention(tmp_path: Path) -> None:
    def counted(rank: int) -> float:
        config = run_config(settings(tmp_path), "fp32", rank)
        return operations(make_config(resolve_shape(config.model), ranks_of(config.method), config.method.kind), 16)

    attention = 2 * 2 * 16 * 32
    assert counted(0) == 2 * (3 + 1 + 4 + 4) * 32 * 32 + 101 * 32 + attention
    pairs = (32 + 96) + (32 + 32) + (32 + 128) + (128 + 32)
    assert counted(4) == 4 * (2 * pairs + 32 + 101) + attention


@pytest.mark.slow
def test_a_whole_run_trains_as_the_plain_loop_beside_it(tmp_path: Path) -> None:
    found = settings(tmp_path, model=TINY | {"vocab_size": VOCAB})
    rows, ratios = overhead(run_config(found, "fp32", 4), found)
    assert [row["way"] for row in rows] == [
        "rank 4, finhpc pretrain (Ray, stream, tracking)",
        "rank 4, plain loop over the same parts",
    ]
    assert ratios == {"overhead_fp32": pytest.approx(rows[0]["tokens_per_s"] / rows[1]["tokens_per_s"])}
    assert list(tmp_path.iterdir()) == [], "what the runs wrote is gone"


def test_runs_that_train_differently_are_no_measurement() -> None:
    from finhpc.bench.measures.overhead import _check_alike

    ours = [{"step": 1.0, "train_loss": 5.0}]
    _check_alike(ours, [{"step": 1.0, "train_loss": 5.0004}], "fp32")
    with pytest.raises(TrainingFailedError, match="step 1: finhpc's loss"):
        _check_alike(ours, [{"step": 1.0, "train_loss": 5.001}], "fp32")


def test_a_gpu_that_is_not_there_is_refused(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match=r"resources\.device=cuda, but torch sees no GPU"):
        bench_train(settings(tmp_path, resources={"device": "cuda"}))


def test_a_profile_names_what_takes_the_time() -> None:
    x = torch.randn(500, 500)
    shares = profiled(lambda: [x @ x for _ in range(20)], torch.device("cpu"))
    assert shares["matrix products"] > 0.8
    assert sum(shares.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("operation", "kind"),
    [
        ("aten::addmm", "matrix products"),
        ("aten::add_", "sums and products"),
        ("aten::_fused_adamw_", "optimizer"),
        ("aten::_log_softmax_backward_data", "softmax and loss"),
        ("aten::native_layer_norm", "norms"),
        ("aten::zero_", "zero fills"),
        ("aten::copy_", "copies and casts"),
        ("aten::empty", REST),
    ],
)
def test_kinds_of_operations(operation: str, kind: str) -> None:
    assert kind_of(operation) == kind
