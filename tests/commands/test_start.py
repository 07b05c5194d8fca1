"""Runs that start from a model on disk: the same numbers, the same ids, refusals before anything is read."""

from __future__ import annotations

import json
import os
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import finhpc
from finhpc.commands.pretrain import pretrain
from finhpc.commands.sweep.score import score_at
from finhpc.data.shards.shards import Shards
from finhpc.errors import CheckpointError, ConfigError
from finhpc.lowrank.blend import blend_in, set_alpha
from finhpc.lowrank.replace import ranks_of
from finhpc.models.families.registry import config_of_method, make_config, resolve_shape, skeleton
from finhpc.models.files.manifest import write_manifest
from finhpc.models.files.weights import Weights
from finhpc.models.folder import save_model
from finhpc.models.initialize import initial_model
from finhpc.models.loading import load_model
from finhpc.models.pipeline import PipelineLayer, parts_of
from finhpc.planning.model import initial_fill
from finhpc.planning.plan import make_plan
from finhpc.settings.base import build, flatten
from finhpc.settings.pretrain import Method, Model, PretrainConfig
from finhpc.training.journal import latest, read
from tests.models.dense import saved, tiny_gpt2, tiny_llama
from tests.tiny import with_tokenizer

COUNTS = ("params_total", "params_dense")
RANKS = {"kind": "svd", "rank": 8, "ranks": {"head": 16}}


@pytest.fixture(scope="module")
def dense(run_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model whose ids are the shards'; tied."""
    return with_tokenizer(saved(tiny_gpt2(), tmp_path_factory.mktemp("dense") / "model"), run_shards)


def config(shards: Path, path: Path | None, storage: Path | None = None, **sections: Any) -> PretrainConfig:
    tree: dict[str, Any] = {
        "model": {"path": path and str(path)},
        "method": RANKS,
        "data": {"shards": str(shards), "seq_len": 32, "eval_samples": 16},
        "train": {"steps": 2, "eval_every": 0, "checkpoint_every": 1},
        "run": {"name": "run", "storage": str(storage)},
    }
    for section, values in sections.items():
        tree[section] = {**tree.get(section, {}), **values} if section != "method" else values
    return build(PretrainConfig, tree)


@pytest.mark.usefixtures("quick_training")
def test_method_2_from_a_dense_model_and_from_its_factors(run_shards: Path, dense: Path, tmp_path: Path) -> None:
    two = {"parallel": {"stages": 2, "micro_batch_size": 4}, "optimizer": {"lr": 1e-9}}
    apart = two | {"method": RANKS | {"qkv": "separate"}}
    result = pretrain(config(run_shards, dense, tmp_path, **apart))
    factors = tmp_path / "run" / "decomposed"
    held = json.loads((factors / "result.json").read_text())
    assert [result[key] for key in COUNTS] == [held[key] for key in COUNTS]
    assert max(layer["error_over_optimal"] for layer in held["layers"]) < 1.001
    opened = load_model(result["model"])
    assert type(opened).__name__ == "LowRankGPT2LMHeadModel"
    assert opened.config.low_rank == {"attention": 8, "mlp": 8, "head": 16, "embedding": None}
    assert opened.get_submodule("transformer.h.0.attn.c_attn").blocks == 3
    batch = torch.from_numpy(Shards.open(run_shards).eval_samples(16, 32))
    with torch.no_grad():
        start = load_model(factors)(batch, labels=batch).loss.item()
    assert result["val_loss"] == pytest.approx(start, rel=1e-5)

    low_rank = with_tokenizer(factors, run_shards)
    again = config(run_shards, low_rank, tmp_path, method={"kind": "svd"}, run={"name": "two"}, **two)
    fill = initial_fill(again, make_plan(again).hf_config, tmp_path)
    block = load_model(factors).get_submodule("transformer.h.1")
    other = deepcopy(block).to_empty(device="cpu")
    fill(other, "transformer.h.1")
    assert all(torch.equal(p, q) for p, q in zip(other.parameters(), block.parameters(), strict=True))

    # What it was started from is what it is: other weights are refused, the same elsewhere are not.
    less = with_tokenizer(saved(tiny_gpt2(layers=2), tmp_path / "less"), run_shards)
    with pytest.raises(
        ConfigError, match=r"model\.path=.*less \(fingerprint \w+\) is not the model that the run started"
    ):
        pretrain(config(run_shards, less, tmp_path, **apart))
    moved = Path(shutil.copytree(dense, tmp_path / "moved"))
    assert pretrain(config(run_shards, moved, tmp_path, **apart))["mlflow_run_id"] == result["mlflow_run_id"]


@pytest.mark.usefixtures("quick_training")
def test_method_3_from_a_dense_model(run_shards: Path, dense: Path, tmp_path: Path) -> None:
    method = {"kind": "blend", "rank": 8, "blend_share": 0.5, "blend_weight": "trainable", "embedding": "low_rank"}
    settings: dict[str, Any] = {"optimizer": {"lr": 3e-3}}
    result = pretrain(config(run_shards, dense, tmp_path, method=method, train={"steps": 6}, **settings))
    records, _ = read(tmp_path / "run" / "journal.jsonl")
    assert [r["alpha"] for r in latest(records, "train").values()] == pytest.approx([0.99, 0.495, 0, 0, 0, 0])
    model = load_model(result["model"])
    assert type(model).__name__ == "LowRankGPT2LMHeadModel"
    assert model.num_parameters() == result["params_total"]
    batch = torch.from_numpy(Shards.open(run_shards).eval_samples(16, 32))
    with torch.no_grad():
        assert model(batch, labels=batch).loss.item() == pytest.approx(result["val_loss"], rel=1e-6)

    # More steps would put W back where it is gone already, unless its share says the same step.
    longer = config(run_shards, dense, tmp_path, method=method, train={"steps": 12}, **settings)
    with pytest.raises(ConfigError, match=r"the step at which W is gone .* was 3 in the run's config, now 6"):
        pretrain(longer)
    longer.method.blend_share = 0.25
    assert finhpc.pretrain(longer, dry_run=True)["status"] == "dry_run"

    # Its first numbers: at alpha 1 it is the dense model.
    hf_config = make_plan(longer).hf_config
    fill, blended = initial_fill(longer, hf_config, tmp_path / "run"), skeleton(hf_config)
    blend_in(blended, trainable=True)
    rows = [PipelineLayer(part, blended, torch.device("cpu"), fill) for part in parts_of(hf_config)]
    set_alpha((module for row in rows for module in row.modules()), 1.0)
    with torch.no_grad():
        data: Any = batch
        for row in rows:
            data = row(data)
        assert data.item() == pytest.approx(load_model(dense)(batch, labels=batch).loss.item(), rel=1e-6)


@pytest.mark.usefixtures("quick_training")
def test_a_blend_without_a_dense_model_trains_its_w(run_shards: Path, tmp_path: Path) -> None:
    method = {"kind": "blend", "rank": 8, "blend_share": 0.5, "blend_start": 1.0, "blend_schedule": "cosine"}
    changes: dict[str, Any] = {"train": {"steps": 6}, "parallel": {"stages": 2, "micro_batch_size": 4}}
    with pytest.raises(ConfigError, match=r"blend_weight=frozen takes W from a dense model, and model\.path is"):
        make_plan(config(run_shards, None, method=method))
    method |= {"blend_weight": "trainable", "head": "dense", "qkv": "separate"}
    result = pretrain(config(run_shards, None, tmp_path, method=method, **changes))
    records, _ = read(tmp_path / "run" / "journal.jsonl")
    assert [r["alpha"] for r in latest(records, "train").values()] == pytest.approx([1, 0.5, 0, 0, 0, 0])
    model, batch = load_model(result["model"]), torch.from_numpy(Shards.open(run_shards).eval_samples(16, 32))
    assert type(model).__name__ == "LowRankGPT2LMHeadModel"
    assert model.num_parameters() == result["params_total"]
    with torch.no_grad():
        assert model(batch, labels=batch).loss.item() == pytest.approx(result["val_loss"], rel=1e-6)


@pytest.mark.usefixtures("quick_training")
def test_sltrain_goes_on_with_the_places_it_has_and_is_scored_merged(run_shards: Path, tmp_path: Path) -> None:
    shape = resolve_shape(Model(preset="gpt2-tiny", layers=2, width=32, context=64), 300)
    hf_config = config_of_method(shape, Method(kind="sltrain", rank=4, sparse_share=0.1, lora_alpha=8.0), seed=5)
    model = initial_model(hf_config, 0, None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    save_model(tmp_path / "first", hf_config, ((n, p.detach()) for n, p in model.named_parameters()), None)
    path = with_tokenizer(tmp_path / "first", run_shards)
    with pytest.raises(ConfigError, match=r"method\.sparse_share conflicts with model\.path"):
        make_plan(config(run_shards, path, method={"kind": "sltrain", "sparse_share": 0.2}))
    train = {"steps": 2, "seed": 9, "checkpoint_every": 0}
    two = {"parallel": {"stages": 2, "micro_batch_size": 4}, "optimizer": {"lr": 1e-9}, "train": train}
    settings = config(run_shards, path, tmp_path, method={"kind": "sltrain"}, **two)
    result = pretrain(settings)
    opened = load_model(result["model"])
    assert opened.config.low_rank_sparse == {"share": 0.1, "lora_alpha": 8.0, "seed": 5}
    assert result["params_total"] == model.num_parameters()
    batch = torch.from_numpy(Shards.open(run_shards).eval_samples(16, 32))
    with torch.no_grad():
        start = load_model(path)(batch, labels=batch).loss.item()
    assert result["val_loss"] == pytest.approx(start, rel=1e-5)
    score = score_at(8, settings, tmp_path / "run")
    assert score["val_loss"] == pytest.approx(result["val_loss"], rel=1e-2)
    assert type(load_model(score["model"])).__name__ == "GPT2LMHeadModel"


@pytest.mark.slow
@pytest.mark.usefixtures("quick_training")
def test_a_dense_model_is_trained_on(run_shards: Path, tmp_path: Path) -> None:
    path = with_tokenizer(saved(tiny_llama(), tmp_path / "llama", max_shard_size="20KB"), run_shards)
    assert len(list(path.glob("*.safetensors"))) > 1
    result = pretrain(config(run_shards, path, tmp_path, method={"kind": "dense"}, optimizer={"lr": 1e-9}))
    before, after = load_model(path), load_model(result["model"])
    batch = torch.from_numpy(Shards.open(run_shards).eval_samples(16, 32))
    with torch.no_grad():
        assert result["val_loss"] == pytest.approx(before(batch, labels=batch).loss.item(), rel=1e-5)
    assert type(after) is type(before)
    assert result["params_total"] == result["params_dense"] == before.num_parameters()


def test_each_stage_reads_its_own_weights_alone(dense: Path, run_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf_config = make_plan(config(run_shards, dense, method={"kind": "dense"})).hf_config
    fill = initial_fill(config(run_shards, dense, method={"kind": "dense"}), hf_config, Path("nowhere"))
    row = parts_of(hf_config)
    names: list[str] = []
    read = Weights.read
    monkeypatch.setattr(Weights, "read", lambda weights, name: names.append(name) or read(weights, name))
    held = load_file(dense / "model.safetensors")
    for part in row[2:4]:
        layer = PipelineLayer(part, skeleton(hf_config), torch.device("cpu"), fill)
        for name, parameter in layer.parameters_by_name():
            assert torch.equal(parameter, held[name]), name
    assert {name.partition(".h.")[2][:2] for name in names} == {"0."}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"model": {"layers": 2, "width": 64}},
            "model.layers, model.width conflict with model.path={dense}, which defines the model; remove one of them",
        ),
        ({"method": {"kind": "low_rank"}}, "method.kind=low_rank starts from scratch or from a low-rank model, and"),
        ({"method": {"kind": "cola"}}, "use method.kind=svd"),
        ({"method": {"kind": "svd", "rank": 33}}, "method.rank=33 does not fit transformer.h.*.attn.c_attn (96 x 32,"),
        (
            {"data": {"seq_len": 64}, "short": 32},
            "data.seq_len=64 is longer than the model's context of 32; lower it or ",
        ),
        ({"method": {"kind": "blend", "init": "normal"}}, "method.init=normal conflicts with model.path={dense}"),
        (
            {"method": {"kind": "blend", "blend_share": 0.5}},
            "method.blend_share=0.5 of train.steps=2 is 1 steps, too few",
        ),
        ({"model": {"path": "nowhere"}}, "model.path=nowhere is not a folder; give a model folder"),
    ],
)
def test_settings_that_do_not_go_with_the_path(
    sections: dict[str, Any], message: str, run_shards: Path, dense: Path, tmp_path: Path
) -> None:
    if short := sections.pop("short", None):
        path = Path(shutil.copytree(dense, tmp_path / "short"))
        text = (path / "config.json").read_text()
        (path / "config.json").write_text(text.replace('"n_positions": 64', f'"n_positions": {short}'))
        dense = path
    with pytest.raises(ConfigError) as caught:
        make_plan(config(run_shards, dense, **sections))
    assert message.format(dense=dense) in str(caught.value)


def test_method_2_needs_a_path_and_a_low_rank_model_its_own_kind(run_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"method\.kind=svd starts from a model, and model\.path is not set"):
        make_plan(config(run_shards, None))
    method = Method(kind="cola", rank=4)
    shape = resolve_shape(Model(preset="gpt2-tiny", layers=1, width=32, context=64), 300)
    hf_config = make_config(shape, ranks_of(method), "cola")
    model = initial_model(hf_config, 0, None)
    save_model(tmp_path / "cola", hf_config, ((n, p.detach()) for n, p in model.named_parameters()), None)
    path = with_tokenizer(tmp_path / "cola", run_shards)
    with pytest.raises(ConfigError) as caught:
        make_plan(config(run_shards, path))
    assert "method.kind=svd cannot continue; use method.kind=cola" in str(caught.value)
    assert f"method.rank, method.ranks conflict with model.path={path}" in str(caught.value)
    with pytest.raises(
        ConfigError, match=r"method\.kind=blend takes W from a dense model, and model\.path=.* is low-rank"
    ):
        make_plan(config(run_shards, path, method={"kind": "blend"}))
    assert make_plan(config(run_shards, path, method={"kind": "cola"})).hf_config.low_rank_kind == "cola"


def damage(folder: Path, how: str) -> None:
    file = folder / "model.safetensors"
    held = load_file(file)
    if how == "cut":
        os.truncate(file, file.stat().st_size // 2)
    elif how == "missing":
        held.pop("transformer.h.1.mlp.c_fc.bias")
        save_file(held, file, metadata={"format": "pt"})
    elif how == "flipped":
        write_manifest(folder)
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.write_bytes(content)
    elif how == "pickled":
        file.rename(folder / "pytorch_model.bin")
    elif how == "family":
        text = (folder / "config.json").read_text()
        (folder / "config.json").write_text(text.replace('"model_type": "gpt2"', '"model_type": "opt"'))
    elif how == "no tokeniser":
        (folder / "tokenizer.json").unlink()
    elif how == "tokeniser":
        text = (folder / "tokenizer.json").read_text()
        (folder / "tokenizer.json").write_text(text.replace('"add_prefix_space":', '"add_prefix_space": true, "x":', 1))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut", "is cut short, damaged or another format"),
        ("missing", "has no transformer.h.1.mlp.c_fc.bias"),
        ("flipped", "is not as it was written"),
        ("pickled", "pickled weights are not opened"),
        ("family", "model_type=opt is not supported; supported: gpt2, llama"),
        ("no tokeniser", "has no tokenizer.json, so its ids cannot"),
        ("tokeniser", "was made with another tokenizer than the one of model.path="),
    ],
)
def test_models_that_cannot_be_started_from(
    how: str, message: str, run_shards: Path, dense: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(dense, tmp_path / "model"))
    damage(path, how)
    with pytest.raises(ConfigError) as caught:
        make_plan(config(run_shards, path))
    assert message in str(caught.value)


def test_weights_that_are_not_numbers_are_named(run_shards: Path, dense: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(dense, tmp_path / "model"))
    held = load_file(path / "model.safetensors")
    name = "transformer.h.1.mlp.c_fc.weight"
    held[name][0, 0] = float("nan")
    save_file(held, path / "model.safetensors", metadata={"format": "pt"})
    settings = config(run_shards, path, method={"kind": "dense"})
    hf_config = make_plan(settings).hf_config
    fill = initial_fill(settings, hf_config, tmp_path)
    module = skeleton(hf_config).get_submodule("transformer.h.1.mlp").to_empty(device="cpu")
    with pytest.raises(CheckpointError, match=rf"{name} holds NaN or infinity"):
        fill(module, "transformer.h.1.mlp")


def test_the_path_and_what_lies_there_come_back_from_a_config(run_shards: Path, dense: Path) -> None:
    settings = config(run_shards, dense)
    assert build(PretrainConfig, settings.model_dump(mode="json")) == settings
    assert flatten(settings)["model.path"] == str(dense)
    plan = make_plan(settings)
    assert plan.init_model is not None
    assert plan.hf_config.n_layer == 3
    assert not plan.hf_config.attn_pdrop, "transformers' own default is 0.1"
