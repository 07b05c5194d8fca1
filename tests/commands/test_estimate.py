"""The verb: what it returns, what it refuses, and that a dry run tells the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finhpc.cli import main
from finhpc.commands.estimate.command import estimate
from finhpc.errors import ConfigError
from finhpc.settings.base import build
from finhpc.settings.estimate import EstimateConfig
from tests.tiny import tiny_shards

TINY = {"model": {"preset": "gpt2-tiny", "width": 32, "context": 64, "vocab_size": 300}, "data": {"seq_len": 32}}


def config(**sections: Any) -> EstimateConfig:
    return build(EstimateConfig, {**TINY, "method": {"rank": 8}, **sections})


def test_a_run_is_planned_by_stage_and_for_the_cluster(capfd: pytest.CaptureFixture[str]) -> None:
    words = "estimate --config llama2-7b-r512 --parallel.stages 4 --parallel.micro_batches 8 --estimate.show 3 --json"
    assert main(words.split()) == 0
    out, err = capfd.readouterr()
    result = json.loads(out)
    numbers = result["estimate"]
    assert result["status"] == "dry_run"
    assert result["tokens_per_s"] is None, "measured figures stay null"
    assert len(numbers["stages"]) == 4
    assert sum(stage["params"] for stage in numbers["stages"]) == result["params_total"]
    assert numbers["pipeline_bubble"] == pytest.approx(3 / 11)
    assert numbers["step_s"] > 0
    assert numbers["recompute"]["full"]["peak_bytes"] < numbers["recompute"]["none"]["peak_bytes"]
    assert numbers["topologies"][0]["fits"]
    for words in ("memory per worker by stage", "topologies on 1 x 8 a100-80gb", "pipeline bubble"):
        assert words in err


def test_what_does_not_fit_is_said_for_every_mode_and_stage() -> None:
    small = {"device": "a100-80gb", "memory_gb": 0.003, "usable": 1.0}
    numbers = estimate(config(estimate=small, parallel={"micro_batch_size": 8}))["estimate"]
    usable = numbers["device"]["usable_bytes"]
    assert usable == 3e6
    modes = numbers["recompute"]
    assert {mode: found["fits"] for mode, found in modes.items()} == {
        mode: found["peak_bytes"] <= usable for mode, found in modes.items()
    }
    assert {modes["none"]["fits"], modes["full"]["fits"]} == {False, True}
    assert [stage["fits"] for stage in numbers["stages"]] == [False]
    assert modes["full"]["operations_ratio"] > modes["none"]["operations_ratio"] == 1


def test_this_machine_is_measured() -> None:
    hardware = {"device": "this-machine", "devices_per_node": 2}
    result = estimate(config(parallel={"stages": 2, "micro_batches": 2}, estimate=hardware))["estimate"]
    assert all(seconds > 0 for seconds in result["stage_s"])
    assert 0 < result["device"]["reached"] < 1
    assert result["device"]["tflops"]["fp32"] > 0


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"estimate": {"device": "a100"}}, "estimate.device=a100 is not known; did you mean 'a100-"),
        ({"estimate": {"zero_stage": 1}}, "estimate.zero_stage=1 does not exist in finhpc's training"),
        (
            {"estimate": {"zero_stage": 2, "scheme": "paper"}, "parallel": {"stages": 2}},
            "estimate.zero_stage=2 with parallel.stages=2",
        ),
        ({"estimate": {"weight_bits": 4}}, "estimate.weight_bits=4 does not exist in finhpc's training"),
        (
            {"estimate": {"micro_batch_sizes": [0]}},
            "estimate.micro_batch_sizes.0=0 is refused: input should be greater",
        ),
        ({"method": {"rank": 33}}, "method.rank=33 does not fit transformer.h.*.attn.c_attn (96 x 32, layers: 4)"),
        (
            {
                "estimate": {"scheme": "paper"},
                "parallel": {"stages": 2, "micro_batches": 4, "schedule": "dualpipev"},
            },
            "estimate.scheme=paper counts the paper's schedule, not parallel.schedule=dualpipev",
        ),
        ({"parallel": {"stages": 5}}, "parallel.stages=5 does not fit 4 transformer blocks"),
        ({"data": {"seq_len": 65}}, "data.seq_len=65 is longer than the model's context of 64"),
    ],
)
def test_bad_settings_say_value_reason_and_remedy(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        estimate(config(**sections))
    assert message in str(caught.value)


def test_what_is_not_counted_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    assert estimate(config())["estimate"]["not_counted"] == []
    method = {"kind": "blend", "rank": 8, "blend_share": 0.5, "embedding": "low_rank", "blend_weight": "trainable"}
    capfd.readouterr()
    sections = {"method": method, "optimizer": {"name": "adamw8bit"}}
    (line,) = estimate(config(**sections))["estimate"]["not_counted"]
    # 4 blocks of 12 width^2, the head and the embedding of 300 x 32; six operations a weight and token, none a row read
    blocks, table = 4 * 12 * 32 * 32, 300 * 32
    assert line.startswith(f"time of W (trainable), {blocks + 2 * table:,} parameters until step 150: ")
    assert f"{6 * (blocks + table):,} operations per token" in line
    lines = estimate(config(**sections, estimate={"scheme": "paper"}))["estimate"]["not_counted"]
    assert lines[0].startswith("memory and time of W")
    assert "adamw8bit" in lines[1]
    assert "not counted" in capfd.readouterr().err
    with pytest.raises(ConfigError, match=r"method\.kind=svd starts from a model, and model\.path is not set"):
        estimate(config(method={"kind": "svd"}))


def test_the_step_of_an_optimizer_has_the_time_of_its_products() -> None:
    """Muon's, by hand: 5 (2 n^2 m + n^3) multiplications for each matrix (n, m) of a block, with q, k and v apart."""

    def planned(name: str, replicas: int = 1) -> dict[str, Any]:
        way = {"replicas": replicas, "shard_optimizer": replicas > 1}
        given = {"method": {"kind": "dense"}, "optimizer": {"name": name}, "parallel": way}
        found: dict[str, Any] = estimate(config(**given))["estimate"]
        return found

    adamw, muon = planned("adamw"), planned("muon")
    products = 4 * (4 * 5 * 3 * 32**3 + 2 * 5 * (2 * 32**2 * 128 + 32**3))  # of 4 blocks
    rate = muon["device"]["tflops"]["bf16"] * 1e12 * muon["device"]["reached"]
    assert muon["optimizer_s"] - adamw["optimizer_s"] == pytest.approx(2 * products / rate, rel=1e-6)
    assert planned("muon", 2)["optimizer_s"] == pytest.approx(muon["optimizer_s"] / 2)
    assert muon["not_counted"] == []
    loro = estimate(config(optimizer={"name": "loro", "restart_every": 70}))["estimate"]
    assert loro["not_counted"] == ["optimizer.name=loro: time of QR and SVD in an exact step, every 70 steps"]


def test_all_problems_come_together() -> None:
    with pytest.raises(ConfigError) as caught:
        estimate(config(estimate={"device": "tpu", "zero_stage": 1}, parallel={"stages": 9}, method={"rank": 99}))
    assert len(caught.value.problems) >= 4


def test_a_dry_run_of_pretrain_estimates_memory_and_time(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shards = tiny_shards(tmp_path / "shards")
    words = f"pretrain --data.shards {shards} --data.seq_len 32 --method.rank 8 --parallel.stages 2 --dry_run --json"
    assert main([*words.split(), "--resources.device", "cpu", "--run.storage", str(tmp_path / "runs")]) == 0
    out, err = capfd.readouterr()
    result = json.loads(out)
    assert result["peak_memory_bytes"] is None, "nothing was measured"
    stages = result["estimate"]["stages"]
    assert sum(stage["params"] for stage in stages) == result["params_total"]
    for stage in stages:
        state = stage["weights_bytes"] + stage["gradients_bytes"] + stage["optimizer_bytes"]
        assert state == 16 * stage["params"]
        assert (
            12 * stage["params"] < stage["peak_bytes"] <= state + stage["intermediates_bytes"] + stage["exchange_bytes"]
        )
    assert result["estimate"]["step_s"] > 0
    assert "memory per worker by stage in MB" in err
    assert " 0:00:00 " not in err
