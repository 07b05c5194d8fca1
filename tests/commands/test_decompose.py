"""Whole decompositions: the same model at full rank, every choice of ranks, interruptions, refusals."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import finhpc
from finhpc.cluster.tasks import stream_task, workplace
from finhpc.commands.decompose import command as module
from finhpc.commands.decompose.command import decompose
from finhpc.commands.decompose.layer_groups import (
    Factorization,
    factorize_group,
    groups_of,
    targets_of,
    whitened_groups,
)
from finhpc.commands.export import export
from finhpc.data.text.tokenizer import save
from finhpc.errors import CheckpointError, ConfigError, RunBusyError
from finhpc.lowrank.ranks import rank_of_energy, rank_of_params
from finhpc.models.files.source import open_weights
from finhpc.settings.base import build
from finhpc.settings.decompose import DecomposeConfig
from finhpc.settings.export import ExportConfig
from finhpc.training.memory import counted_peak
from tests.data.corpus import make_texts, write_jsonl
from tests.models.dense import logits, saved, tiny_gpt2, tiny_llama, tiny_mistral, tiny_qwen2
from tests.models.families import tiny
from tests.waiting import wait_until

pytestmark = pytest.mark.usefixtures("ray_cluster")


def settings(folder: Path, **changes: Any) -> DecomposeConfig:
    return build(DecomposeConfig, {"model": str(folder / "dense"), "out": str(folder / "low-rank")} | changes)


FAMILIES = {"gpt2": tiny_gpt2, "llama": tiny_llama, "gemma 2": partial(tiny, "Gemma 2", tie_word_embeddings=True)}


@pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES)
def test_at_full_rank_the_model_is_the_same(tmp_path: Path, make: Any) -> None:
    dense = make()
    saved(dense, tmp_path / "dense")
    result = decompose(settings(tmp_path, keep_energy=1.0))
    opened = finhpc.load_model(tmp_path / "low-rank")
    assert type(opened).__name__.startswith("LowRank")
    torch.testing.assert_close(logits(opened), logits(dense), rtol=0, atol=2e-5 * float(logits(dense).abs().max()))
    assert opened.config.tie_word_embeddings
    assert opened.lm_head.weight is opened.get_input_embeddings().weight
    assert sum(p.numel() for p in opened.parameters()) == result["params_total"] > result["params_dense"]
    for layer in result["layers"]:
        assert layer["rank"] == min(layer["out_features"] // layer["blocks"], layer["in_features"])
    assert max(layer["error"] for layer in result["layers"]) < 1e-6
    assert {layer["error_over_optimal"] for layer in result["layers"]} == {None}
    assert json.loads((tmp_path / "low-rank" / "result.json").read_bytes()) == result
    assert not (tmp_path / "low-rank.partial").exists()


@pytest.mark.parametrize("make", [tiny_mistral, tiny_qwen2], ids=["mistral", "qwen2"])
def test_llama_like_families_are_decomposed_and_merged_again(tmp_path: Path, make: Any) -> None:
    dense = make()
    saved(dense, tmp_path / "dense")
    decompose(settings(tmp_path, keep_energy=1.0))
    opened = finhpc.load_model(tmp_path / "low-rank")
    torch.testing.assert_close(logits(opened), logits(dense), rtol=0, atol=2e-5 * float(logits(dense).abs().max()))
    export(ExportConfig(model=str(tmp_path / "low-rank"), format="merged", out=str(tmp_path / "merged")))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert type(merged) is type(dense)
    torch.testing.assert_close(logits(merged), logits(opened), rtol=1e-4, atol=1e-4)


def test_one_rank_and_its_report(tmp_path: Path) -> None:
    dense = tiny_gpt2()
    saved(dense, tmp_path / "dense")
    result = decompose(settings(tmp_path, rank=8))
    opened = finhpc.load_model(tmp_path / "low-rank")
    assert opened.config.low_rank == {"attention": 8, "mlp": 8, "head": None, "embedding": None}
    assert opened.config.low_rank_layers is None
    assert [layer["name"] for layer in result["layers"]][:5] == [
        "transformer.h.0.attn.c_attn",
        "transformer.h.0.attn.c_proj",
        "transformer.h.0.mlp.c_fc",
        "transformer.h.0.mlp.c_proj",
        "transformer.h.1.attn.c_attn",
    ]
    with np.load(tmp_path / "low-rank" / "spectra.npz", allow_pickle=False) as held:
        spectra = dict(held)
    for layer in result["layers"]:
        weight = dense.get_submodule(layer["name"]).weight.detach().double().T
        low = opened.get_submodule(layer["name"])
        singular = torch.linalg.svdvals(weight)
        error = float(torch.linalg.norm(weight - low.B.weight.double() @ low.A.weight.double()).detach())
        assert layer["error"] == pytest.approx(error / float(weight.norm()), rel=1e-5)
        assert layer["error_over_optimal"] == pytest.approx(error / float(singular[8:].norm()), rel=1e-4)
        assert layer["error_over_optimal"] < 1.001
        np.testing.assert_allclose(spectra[layer["name"]], singular.numpy(), rtol=3e-3)
        assert torch.equal(low.B.bias, dense.get_submodule(layer["name"]).bias)
    assert (tmp_path / "low-rank" / "spectra.png").stat().st_size > 10_000
    assert result["compression_ratio"] == result["params_dense"] / result["params_total"] > 1
    assert min(result["peak_memory_bytes"]) > 10_000_000


@pytest.mark.parametrize(
    ("make", "changes", "low_rank"),
    [
        (tiny_gpt2, {"ranks": {"mlp": 4}}, {"attention": None, "mlp": 4, "head": None, "embedding": None}),
        (tiny_llama, {"rank": 6, "ranks": {"mlp": 4}}, {"attention": 6, "mlp": 4, "head": None, "embedding": None}),
        (tiny_llama, {"rank": 6, "head": "low_rank"}, {"attention": 6, "mlp": 6, "head": 6, "embedding": None}),
        (tiny_gpt2, {"rank": 6, "embedding": "low_rank"}, {"attention": 6, "mlp": 6, "head": None, "embedding": 6}),
    ],
)
def test_kinds_of_layers(tmp_path: Path, make: Any, changes: Any, low_rank: Any) -> None:
    dense = make()
    saved(dense, tmp_path / "dense")
    result = decompose(settings(tmp_path, **changes))
    opened = finhpc.load_model(tmp_path / "low-rank")
    assert opened.config.low_rank == low_rank
    untied = low_rank["head"] is not None or low_rank["embedding"] is not None
    assert opened.config.tie_word_embeddings != untied
    assert sum(p.numel() for p in opened.parameters()) == result["params_total"]
    table = dense.get_input_embeddings().weight
    if low_rank["embedding"]:
        held = opened.get_input_embeddings()
        optimum = float(torch.linalg.svdvals(table.double())[6:].norm())
        assert (
            float(torch.linalg.norm(table.double() - held.A.weight.double() @ held.B.weight.double().T))
            < 1.001 * optimum
        )
        assert torch.equal(opened.lm_head.weight, table)
    if low_rank["head"]:
        assert torch.equal(opened.get_input_embeddings().weight, table)
        assert opened.lm_head.A.weight.shape == (6, 32)


@pytest.mark.parametrize("how", [{"rank": 8, "ranks": {"out": 5}}, {"keep_energy": 0.7}, {"keep_params": 0.6}])
def test_q_k_and_v_are_factorized_each_by_itself(tmp_path: Path, how: dict[str, Any]) -> None:
    dense = tiny_gpt2()
    saved(dense, tmp_path / "dense")
    result = decompose(settings(tmp_path, qkv="separate", **how))
    opened = finhpc.load_model(tmp_path / "low-rank")
    assert sum(p.numel() for p in opened.parameters()) == result["params_total"]
    with np.load(tmp_path / "low-rank" / "spectra.npz", allow_pickle=False) as held:
        spectra = dict(held)
    for layer in result["layers"]:
        weight = dense.get_submodule(layer["name"]).weight.detach().double().T
        low, blocks = opened.get_submodule(layer["name"]), 3 if "c_attn" in layer["name"] else 1
        assert layer["blocks"] == low.blocks == blocks
        pieces = weight.chunk(blocks)
        singular = [torch.linalg.svdvals(piece) for piece in pieces]
        if "keep_energy" in how:
            assert layer["rank"] == max(rank_of_energy(values, 0.7) for values in singular)
        elif "keep_params" in how:
            assert layer["rank"] == rank_of_params(*pieces[0].shape, 0.6)
        else:
            assert layer["rank"] == (5 if "attn.c_proj" in layer["name"] else 8)
        product = low.product(low.A.weight, low.B.weight).double()
        for piece, mine, values in zip(pieces, product.chunk(blocks), singular, strict=True):
            assert torch.linalg.norm(piece - mine) <= 1.001 * values[layer["rank"] :].norm()
        optimum = torch.cat([values[layer["rank"] :] for values in singular]).norm()
        error = float(torch.linalg.norm(weight - product).detach())
        assert layer["error"] == pytest.approx(error / float(weight.norm()), rel=1e-5)
        assert layer["error_over_optimal"] == pytest.approx(error / float(optimum), rel=1e-4)
        stored = spectra[layer["name"]]
        np.testing.assert_allclose(np.atleast_2d(stored), torch.stack(singular).numpy(), rtol=3e-3)
    assert (tmp_path / "low-rank" / "spectra.png").stat().st_size > 10_000


def test_shares_give_layers_ranks_of_their_own(tmp_path: Path) -> None:
    dense = tiny_llama()
    saved(dense, tmp_path / "dense")
    decompose(settings(tmp_path, keep_params=0.5))
    opened = finhpc.load_model(tmp_path / "low-rank")
    assert opened.config.low_rank["mlp"] == 9  # 0.5 x 32 x 48 / (32 + 48): the same for all
    assert opened.config.low_rank["attention"] is None
    assert opened.config.low_rank_layers["model.layers.2.self_attn.q_proj"] == 8
    assert opened.config.low_rank_layers["model.layers.2.self_attn.k_proj"] == 5
    again = tmp_path / "again"
    opened.save_pretrained(again)
    assert torch.equal(logits(finhpc.load_model(again)), logits(opened))

    result = decompose(settings(tmp_path, keep_energy=0.8, out=str(tmp_path / "energy")))
    for layer in result["layers"]:
        singular = torch.linalg.svdvals(dense.get_submodule(layer["name"]).weight.detach().double())
        assert layer["rank"] == rank_of_energy(singular, 0.8)
        assert layer["error"] ** 2 <= 0.2
    assert len({layer["rank"] for layer in result["layers"]}) > 1
    finhpc.load_model(tmp_path / "energy")


def whitened(folder: Path, **changes: Any) -> DecomposeConfig:
    texts = make_texts(200)
    source = write_jsonl(folder / "text.jsonl", texts)
    if not (folder / "dense" / "tokenizer.json").is_file():
        save("train:300", folder / "tokenizer", lambda: iter(texts))
        for file in (folder / "tokenizer").iterdir():
            (folder / "dense" / file.name).write_bytes(file.read_bytes())
    calibration = {"source": [str(source)], "samples": 16, "seq_len": 32}
    return settings(folder, whiten=True, calibration=calibration, **changes)


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama], ids=["gpt2", "llama"])
def test_whitened_outputs_are_nearer_and_the_weights_farther(tmp_path: Path, make: Any) -> None:
    dense = make()
    saved(dense, tmp_path / "dense")
    best = decompose(whitened(tmp_path, rank=8, head="low_rank", qkv="separate", out=str(tmp_path / "white")))
    plain = decompose(settings(tmp_path, rank=8, head="low_rank", qkv="separate"))
    assert [layer["name"] for layer in best["layers"]] == [layer["name"] for layer in plain["layers"]]
    for layer, other in zip(best["layers"], plain["layers"], strict=True):
        assert layer["error_over_optimal"] < 1.001
        assert layer["error"] >= other["error"] * 0.9999
        assert layer["output_error"] < 1
        assert layer["damping"] == 0
    assert "output_error" not in plain["layers"][0]
    tokens = module.calibration_blocks(whitened(tmp_path).calibration, tmp_path / "dense")

    def distance(path: Path) -> float:
        """Of what the first MLP puts out from what it put out before, both after the dense layers before it."""
        low, name = finhpc.load_model(path), plain["layers"][-2]["name"]
        seen: list[torch.Tensor] = []
        hook = dense.get_submodule(name).register_forward_pre_hook(lambda layer, given: seen.append(given[0]))
        with torch.no_grad():
            dense(tokens)
            hook.remove()
            one, two = dense.get_submodule(name)(seen[0]), low.get_submodule(name)(seen[0])
        return float(torch.linalg.norm(one - two))

    assert distance(tmp_path / "white") < 0.999 * distance(tmp_path / "low-rank")
    assert (tmp_path / "white" / "tokenizer.json").is_file()


def test_moments_of_another_process_are_the_same(tmp_path: Path) -> None:
    """As on a cluster whose GPUs are not on the machine that runs the command."""
    saved(tiny_llama(), tmp_path / "dense")
    config = whitened(tmp_path, rank=4)
    tokens, weights = torch.randint(0, 300, (6, 32)), open_weights(tmp_path / "dense")
    groups = groups_of(targets_of(weights, config), weights, True, False)
    found = []
    for name in ("here", "there"):
        work = tmp_path / name
        work.mkdir()
        task = Factorization(tmp_path / "dense", name, work, None, 1, False)
        ready = partial(whitened_groups, task)
        stream = ready((groups, tokens)) if name == "here" else stream_task(ready, (groups, tokens), name, 2, 1, 0)
        found.append({str(group): load_file(group.moments) for group in stream if group.moments})
    here, there = found
    assert here.keys() == there.keys() == {str(group) for group in groups}
    assert all(torch.equal(there[group][name], value) for group in here for name, value in here[group].items())


def peaks(folder: Path, layers: int) -> tuple[int, int]:
    """Most tensor bytes alive at once, counted: in a process that does all groups, and in the one that asks.

    Without the file's own: safetensors maps it whole, and the count takes what is mapped for memory.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    saved(
        GPT2LMHeadModel(
            GPT2Config(
                vocab_size=50, n_positions=8, n_embd=512, n_layer=layers, n_head=4, bos_token_id=0, eos_token_id=0
            )
        ),
        folder,
    )
    config = build(DecomposeConfig, {"model": str(folder), "out": str(folder / "low-rank"), "rank": 16})
    weights = open_weights(folder)
    (folder / "work").mkdir()
    task = Factorization(folder, str(folder), folder / "work", None, 1, False)
    groups = groups_of(targets_of(weights, config), weights, False, False)
    _, worker = counted_peak(lambda: [factorize_group(task, group) for group in groups])
    _, driver = counted_peak(lambda: decompose(config))
    mapped = (folder / "model.safetensors").stat().st_size
    return worker - mapped, driver - mapped


def test_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path) -> None:
    (worker_4, driver_4), (worker_8, driver_8) = peaks(tmp_path / "4", 4), peaks(tmp_path / "8", 8)
    layer = 12 * 512 * 512 * 4  # bytes of one block
    assert worker_4 > layer / 3, "the largest weight was not counted"
    assert worker_8 - worker_4 < layer / 10
    assert driver_8 - driver_4 < layer / 10


def test_too_little_calibration_text_is_refused(tmp_path: Path) -> None:
    saved(tiny_llama(), tmp_path / "dense")
    config = whitened(tmp_path, rank=4)
    config.calibration.samples = 100_000
    with pytest.raises(ConfigError, match=r"fewer than calibration\.samples x calibration\.seq_len"):
        decompose(config)
    assert not (tmp_path / "low-rank").exists()


def test_a_finished_one_is_reported_and_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tiny_llama(), tmp_path / "dense")
    first = decompose(settings(tmp_path, rank=4))
    stamp = (tmp_path / "low-rank" / "model.safetensors").stat().st_mtime_ns
    assert decompose(settings(tmp_path, rank=4)) == first
    assert "nothing to do" in capsys.readouterr().err
    assert (tmp_path / "low-rank" / "model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(ConfigError, match="already holds a model made with other settings"):
        decompose(settings(tmp_path, rank=5))
    with pytest.raises(ConfigError, match="holds other files"):
        decompose(settings(tmp_path, rank=5, out=str(tmp_path / "dense")))


def killed(folder: Path, config: DecomposeConfig, groups: int) -> None:
    """Run a decomposition in a process of its own and kill it when some groups are on disk."""
    code = (
        "import sys, finhpc.commands.decompose.command as d\n"
        "d.decompose(d.DecomposeConfig.model_validate_json(sys.argv[1]))"
    )
    with open(folder / "stderr", "ab") as log:
        process = subprocess.Popen([sys.executable, "-c", code, config.model_dump_json()], stderr=log, stdout=log)
    work = Path(config.out + ".partial")
    wait_until(lambda: len(list(work.glob("group-*.safetensors"))) >= groups, process, folder / "stderr", pause_s=0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_killed_run_leaves_nothing_finished_and_continues(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    wide = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=8, n_embd=512, n_layer=8, n_head=4))
    saved(wide, tmp_path / "dense")
    config = settings(tmp_path, rank=16, workers=1)
    killed(tmp_path, config, 2)
    assert not (tmp_path / "low-rank").exists()
    work = tmp_path / "low-rank.partial"
    done = {path: path.stat().st_mtime_ns for path in work.glob("group-*.safetensors")}
    resumed = decompose(config)
    said = capsys.readouterr().err
    assert "continuing: " in said
    straight = decompose(settings(tmp_path, rank=16, out=str(tmp_path / "straight")))
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("low-rank", "straight"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert [layer["name"] for layer in resumed["layers"]] == [layer["name"] for layer in straight["layers"]]
    assert len(done) >= 2
    assert not work.exists()


def test_an_interrupted_run_with_other_settings_is_discarded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tiny_gpt2(), tmp_path / "dense")
    with monkeypatch.context() as patch:
        patch.setattr(module, "_assemble", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            decompose(settings(tmp_path, rank=4))
    assert list((tmp_path / "low-rank.partial").glob("group-*.safetensors"))
    assert decompose(settings(tmp_path, rank=5))["layers"][0]["rank"] == 5
    assert "discarding the unfinished work of a run with other settings" in capsys.readouterr().err


def test_two_cannot_write_the_same_folder(tmp_path: Path) -> None:
    saved(tiny_gpt2(), tmp_path / "dense")
    work, out = tmp_path / "low-rank.partial", tmp_path / "low-rank"
    with workplace(work, out, "x"), pytest.raises(RunBusyError, match="is busy"):
        decompose(settings(tmp_path, rank=4))


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, name: str) -> None:
    saved(tiny_llama(), tmp_path / "dense")
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    tensors[name].reshape(-1)[3] = float("nan")
    save_file(tensors, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{name} holds NaN or infinity"):
        decompose(settings(tmp_path, rank=4))
    assert not (tmp_path / "low-rank").exists()


def test_every_layer_that_a_rank_does_not_fit_is_named(tmp_path: Path) -> None:
    saved(tiny_llama(), tmp_path / "dense")
    with pytest.raises(ConfigError) as caught:
        decompose(settings(tmp_path, rank=17, ranks={"mlp": 40}))
    assert caught.value.problems == [
        "rank=17 does not fit model.layers.*.self_attn.k_proj (16 x 32, layers: 3), "
        "model.layers.*.self_attn.v_proj (16 x 32, layers: 3); use 1 to 16 (ranks.KIND sets one kind of layer).",
        "rank=40 does not fit model.layers.*.mlp.gate_proj (48 x 32, layers: 3), "
        "model.layers.*.mlp.up_proj (48 x 32, layers: 3), model.layers.*.mlp.down_proj (32 x 48, layers: 3); use 1 to "
        "32 (ranks.KIND sets one kind of layer).",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "no rank is set"),
        ({"rank": 4, "keep_energy": 0.5}, "rank and keep_energy both set the rank"),
        ({"ranks": {"mpl": 4}}, "ranks.mpl: unknown kind of layer"),
        ({"ranks": {"head": 4}}, "ranks.head=4, but head=dense; use head=low_rank, or remove"),
        ({"rank": 4, "calibration": {"source": ["x"]}}, "whiten is off"),
        ({"rank": 4, "whiten": True}, "calibration.source is not set"),
        (
            {"rank": 4, "resources": {"device": "cpu", "cpus_per_worker": 1000}},
            "do not fit the cluster, which has room for 0",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path: Path, changes: Any, message: str) -> None:
    saved(tiny_llama(), tmp_path / "dense")
    save("train:300", tmp_path / "tokenizer", lambda: iter(make_texts(20)))
    for file in (tmp_path / "tokenizer").iterdir():
        (tmp_path / "dense" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ConfigError) as caught:
        decompose(settings(tmp_path, **changes))
    assert message in str(caught.value)
    assert not (tmp_path / "low-rank").exists()


def test_a_low_rank_model_is_not_decomposed_again(tmp_path: Path) -> None:
    saved(tiny_llama(), tmp_path / "dense")
    decompose(settings(tmp_path, rank=4))
    with pytest.raises(ConfigError, match="is low-rank already"):
        open_weights(tmp_path / "low-rank")


def test_a_dry_run_counts_and_writes_nothing(tmp_path: Path) -> None:
    saved(tiny_llama(), tmp_path / "dense")
    counted = decompose(settings(tmp_path, rank=4), dry_run=True)
    assert decompose(settings(tmp_path, keep_energy=0.5), dry_run=True)["params_total"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
    done = decompose(settings(tmp_path, rank=4))
    assert counted["params_total"] == done["params_total"]
    assert counted["layers"][0]["error"] is None
