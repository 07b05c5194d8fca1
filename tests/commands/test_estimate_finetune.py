"""The verb for finetuning: what it returns beside the paper's Table IX, what it refuses, and a dry run's estimate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import finhpc
from finhpc.cli import main
from finhpc.commands.estimate.finetuning import estimate_finetune, pack_of
from finhpc.errors import ConfigError
from finhpc.planning import paper
from finhpc.settings.base import build, load
from finhpc.settings.estimate import FinetuneEstimateConfig
from tests.commands.test_finetune import base as base
from tests.commands.test_finetune import config as finetune_config
from tests.commands.test_finetune import news as news
from tests.models.dense import saved, tiny_llama
from tests.tiny import with_tokenizer


def config(**sections: Any) -> FinetuneEstimateConfig:
    return build(FinetuneEstimateConfig, {"model": {"preset": "llama-tiny"}, **sections})


@pytest.mark.parametrize("size", ["7b", "13b"])
def test_a_qlora_run_stands_beside_table_ix(size: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(f"estimate finetune --config finetune-llama2-{size} --json".split()) == 0
    out, err = capfd.readouterr()
    numbers = json.loads(out)["estimate"]
    rows = numbers["table_ix"]
    assert len(rows) == 5
    for row in rows:
        assert row["params_trainable"] / 1e6 == pytest.approx(row["trained_m"], abs=0.1), "as printed"
    by_bits = {row["bits"]: row for row in numbers["by_bits"]}
    assert by_bits[16]["base_bytes"] / 1e9 == pytest.approx(rows[2]["model_gb"], rel=0.01), "16 bits a weight"
    for bits, share in ((8, 0.54), (4, 0.31)):
        assert by_bits[bits]["base_bytes"] < share * by_bits[16]["base_bytes"]
        saved_bytes = by_bits[16]["base_bytes"] - by_bits[bits]["base_bytes"]
        assert by_bits[16]["peak_bytes"] - by_bits[bits]["peak_bytes"] == pytest.approx(saved_bytes, rel=0.02)
    assert numbers["stages"][0]["peak_bytes"] == by_bits[4]["peak_bytes"]
    assert numbers["step_s"] > 0
    assert "where the paper's table and the arithmetic disagree" in err


def test_what_the_differences_say_is_the_arithmetic() -> None:
    sizes = {}
    for size in ("7b", "13b"):
        found = estimate_finetune(load(FinetuneEstimateConfig, f"finetune-llama2-{size}"))["estimate"]
        sizes[size] = [f"{row['base_bytes'] / 1e9:.1f}" for row in found["by_bits"][1:]]
    said = next(d["arithmetic"] for d in paper.differences("finetuning") if "model size" in d["where"])
    assert said == "; ".join(f"{eight}, {four} GB" for eight, four in sizes.values())


def test_what_examples_share_is_computed_once() -> None:
    work = {"tokens": 100, "answer": 5}
    parallel = {"micro_batch_size": 4}
    whole = pack_of(config(estimate=work, parallel=parallel))
    shared = pack_of(config(estimate=work | {"shared": 60}, parallel=parallel))
    assert whole.tokens == 4 * 99, "the last token predicts nothing"
    assert shared.tokens == 60 + 4 * 39
    assert len(whole.segments.targets) == len(shared.segments.targets) == 20
    assert whole.pairs == 4 * 99 * 99 / 2
    assert shared.pairs == 60 * 60 / 2 + 4 * 39 * (60 + 39 / 2)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {}}, "give the base as one of model.path"),
        ({"model": {"preset": "llama3-8b"}}, "model.preset=llama3-8b is not a known shape"),
        ({"estimate": {"device": "a100"}}, "estimate.device=a100 is not known"),
        ({"estimate": {"tokens": 64, "answer": 30, "shared": 40}}, "leave nothing of estimate.tokens=64"),
        ({"estimate": {"tokens": 5000}}, "estimate.tokens=5000 is longer than the base's context of 4096"),
        ({"lora": {"targets": ["query"]}}, "lora.targets=query matches no linear layer"),
        ({"parallel": {"stages": 9}}, "parallel.stages=9"),
        (
            {"parallel": {"stages": 2, "micro_batches": 4, "schedule": "dualpipev"}},
            "parallel.schedule=dualpipev needs micro-batches of one shape, but packs of examples differ in length",
        ),
    ],
)
def test_bad_settings_say_value_reason_and_remedy(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        estimate_finetune(config(**sections))
    assert message in str(caught.value)


def test_a_dry_run_estimates_memory_and_time(
    base: Path, news: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finhpc.models.files.manifest.REMEMBERED_BYTES", 0)
    monkeypatch.delattr("finhpc.models.files.manifest.weight_sha256")  # which would read the whole base
    settings = finetune_config(base, news, tmp_path, parallel={"stages": 2}, resources={"device": "cpu"})
    result = finhpc.finetune(settings, dry_run=True)
    assert result["status"] == "dry_run"
    stages = result["estimate"]["stages"]
    assert sum(stage["params"] for stage in stages) == result["params_trainable"]
    assert all(stage["peak_bytes"] > stage["weights_bytes"] > 4 * result["params_dense"] / 3 for stage in stages)
    assert result["estimate"]["step_s"] > 0
    assert "memory per worker by stage" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_adapters_on_single_blocks_are_counted(tmp_path: Path, run_shards: Path) -> None:
    folder = with_tokenizer(saved(tiny_llama(layers=5), tmp_path / "model"), run_shards)
    work = {"tokens": 40, "answer": 4}
    lora = {"rank": 2, "targets": ["layers.3.mlp.up_proj"]}
    result = estimate_finetune(config(model={"path": str(folder)}, estimate=work, lora=lora))
    assert result["params_trainable"] == 2 * (32 + 48)
