"""What a config is refused for, before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finhpc.cluster.connect import check_fits
from finhpc.data.shards.shards import Shards
from finhpc.errors import ConfigError, DataError
from finhpc.files import write_json
from finhpc.planning.plan import check_tokenizer, make_plan
from finhpc.settings.base import build
from finhpc.settings.pretrain import PretrainConfig
from finhpc.settings.training import Optimizer
from tests.tiny import tiny_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_shards(tmp_path_factory.mktemp("data") / "shards")


def config(shards: Path, **sections: Any) -> PretrainConfig:
    tree: dict[str, Any] = {
        "model": {"preset": "gpt2-tiny", "width": 32, "context": 64},
        "method": {"rank": 8},
        "data": {"shards": str(shards), "seq_len": 32},
    }
    for section, values in sections.items():
        tree[section] = tree.get(section, {}) | values
    return build(PretrainConfig, tree)


def test_a_good_config_is_counted(shards: Path) -> None:
    plan = make_plan(config(shards, parallel={"stages": 2}))
    assert 0 < plan.params_total < plan.params_dense
    assert plan.hf_config.eos_token_id == plan.shards.manifest.eot_id
    full = make_plan(config(shards, parallel={"stages": 4}, train={"recompute": "full"}))
    assert full.params_total == plan.params_total
    assert len(full.outline.stages(4)) == 4
    assert full.outline.kinds.count("block") == 4


def test_the_weights_that_an_optimizer_updates_are_counted(shards: Path) -> None:
    plan = make_plan(config(shards, method={"kind": "dense"}, optimizer={"name": "muon"}))
    assert plan.outline.taken(plan.config.optimizer) == 4 * 12 * 32 * 32
    assert plan.outline.taken(Optimizer()) == plan.params_total


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"method": {"rank": 33}},
            "method.rank=33 does not fit transformer.h.*.attn.c_attn (96 x 32, layers: 4), ",
        ),
        ({"method": {"rank": 0}}, "method.rank=0 does not fit"),
        ({"method": {"kind": "lowrank"}}, "method.kind=lowrank is unknown; did you mean 'low_rank'?"),
        (
            {"optimizer": {"decay": "product"}, "quantization": {"when": "during", "bits": 8}},
            "optimizer.decay=product does not work on rounded weights; use optimizer.decay=factors",
        ),
        (
            {"method": {"kind": "dense"}, "optimizer": {"name": "spectron"}},
            "optimizer.name=spectron updates A and B of pairs in transformer blocks, and this model trains none; use "
            "one of adamw, adamw8bit, muon, apollo_mini",
        ),
        (
            {"method": {"kind": "cola"}, "optimizer": {"name": "loro"}},
            "optimizer.name=loro moves the product of A and B, which is not the whole layer of method.kind=cola; use "
            "another optimizer, or method.kind=low_rank.",
        ),
        (
            {"optimizer": {"name": "spectron", "rates": "mup"}},
            "optimizer.rates=mup does not work with optimizer.name=spectron, whose step sets the rates of A and B",
        ),
        ({"optimizer": {"momentum": 0.9}}, "optimizer.momentum=0.9 does nothing with optimizer.name=adamw and"),
        ({"parallel": {"stages": 5}}, "parallel.stages=5 does not fit 4 transformer blocks; use 1 to 4."),
        (
            {"parallel": {"stages": 2}, "model": {"layers": 1}},
            "parallel.stages=2 does not fit 1 transformer block; use 1.",
        ),
        (
            {"parallel": {"schedule": "dualpipev", "micro_batches": 8}},
            "parallel.schedule=dualpipev needs several workers to exchange micro-batches, but parallel.stages=1; use "
            "parallel.stages=2 or more, or parallel.schedule=1f1b.",
        ),
        (
            {"parallel": {"schedule": "dualpipev", "stages": 2, "micro_batches": 3}},
            "parallel.schedule=dualpipev needs 2 x parallel.stages = 4 micro-batches or more, but "
            "parallel.micro_batches=3; use 4 or more, or parallel.schedule=1f1b.",
        ),
        (
            {
                "parallel": {"schedule": "dualpipev", "stages": 3, "micro_batches": 6},
                "train": {"recompute": "full"},
            },
            "parallel.stages=3 does not fit 4 transformer blocks with parallel.schedule=dualpipev and "
            "train.recompute=full; use 1 to 2.",
        ),
        ({"parallel": {"micro_batches": 3, "global_batch_size": 16}}, "parallel.global_batch_size=16 is not"),
        (
            {"data": {"seq_len": 48}},
            "data.seq_len=48 does not divide the shards' block_len=64; use one of: 8, 16, 32, 64",
        ),
        (
            {"data": {"seq_len": 48}, "model": {"context": 32}},
            "data.seq_len=48 does not divide the shards' block_len=64; use one of: 4, 8, 16, 32.",
        ),
        ({"model": {"context": 16}}, "data.seq_len=32 is longer than the model's context of 16"),
        ({"model": {"vocab_size": 17}}, "model.vocab_size=17 is smaller than the tokenizer's"),
    ],
)
def test_bad_settings_say_value_reason_and_remedy(shards: Path, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_plan(config(shards, **sections))
    assert message in str(caught.value)


@pytest.mark.parametrize("prepared", [True, False])
def test_all_problems_come_together(shards: Path, prepared: bool, tmp_path: Path) -> None:
    folder = shards if prepared else tmp_path / "nowhere"
    bad = config(folder, method={"rank": 99}, data={"seq_len": 48}, parallel={"global_batch_size": 5, "stages": 9})
    with pytest.raises(ConfigError) as caught:
        make_plan(bad)
    text = str(caught.value)
    assert "global_batch_size=5" in text
    assert ("seq_len=48" if prepared else f"data.shards={folder} is not a folder") in text
    assert "rank=99" in text
    assert "stages=9" in text


@pytest.mark.parametrize(
    ("prepared", "message"),
    [(None, "is not a folder"), ("empty", "is empty"), ("half", "not prepared, or interrupted")],
)
def test_folders_that_are_no_shards(shards: Path, prepared: str | None, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    if prepared:
        folder.mkdir()
    if prepared == "half":
        (folder / "train-00000.parquet").write_bytes(b"")
    with pytest.raises(ConfigError, match=message):
        make_plan(config(folder))


def test_a_flipped_bit_in_a_shard_is_noticed_and_named(tmp_path: Path) -> None:
    folder = tiny_shards(tmp_path / "shards")
    file = folder / "train-00001.parquet"
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1
    file.write_bytes(content)
    opened = Shards.open(folder)
    opened.read_shard("train", 0)
    with pytest.raises(DataError, match=r"train-00001\.parquet"):
        opened.read_shard("train", 1)


def test_shards_of_another_tokeniser_are_refused(shards: Path, tmp_path: Path) -> None:
    plan = make_plan(config(shards))
    saved = tmp_path / "step_00000010"
    saved.mkdir()
    whole = {"step": 10, "files": {"stage-0": {}}, "workers": 1, "consumed": "0"}
    write_json(saved / "manifest.json", whole | {"tokenizer_sha256": "0" * 64})
    with pytest.raises(ConfigError, match="was made with another tokenizer"):
        check_tokenizer(plan.config, plan.shards, tmp_path)
    write_json(saved / "manifest.json", whole | {"tokenizer_sha256": plan.shards.manifest.tokenizer_sha256})
    check_tokenizer(plan.config, plan.shards, tmp_path)


def test_workers_of_one_run_do_not_share_a_gpu(shards: Path) -> None:
    total = {"CPU": 8.0, "GPU": 2.0}
    half = config(shards, resources={"gpus_per_worker": 0.5})
    check_fits(half, True, total)
    for parallel in ({"stages": 2}, {"replicas": 2}):
        several = config(shards, parallel=parallel, resources={"gpus_per_worker": 0.5})
        with pytest.raises(ConfigError, match=r"resources\.gpus_per_worker=0\.5 with 2 workers .* use .*=1"):
            check_fits(several, True, total)
        check_fits(several, False, total)
