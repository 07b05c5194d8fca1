"""Finetuning from files to an adapter: what peft opens, what a resumed run gives, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from sklearn.metrics import f1_score
from transformers import AutoModelForCausalLM, AutoTokenizer

from finhpc.commands.export import export
from finhpc.commands.finetune import Finetune, batches_of, finetune
from finhpc.commands.sweep.command import sweep
from finhpc.errors import ConfigError
from finhpc.evaluation.models import load_for_evaluation
from finhpc.models.families.registry import as_low_rank, skeleton
from finhpc.models.files.source import open_weights
from finhpc.models.folder import save_model
from finhpc.models.initialize import initial_model
from finhpc.models.loading import load_model
from finhpc.models.lora.peft_format import Adapter, merge_adapter, save_adapter
from finhpc.models.lora.targets import target_shapes
from finhpc.runs.folder import RunFolder
from finhpc.runs.launch import use_in_task, worker_arguments, worker_share
from finhpc.settings.base import build
from finhpc.settings.export import ExportConfig
from finhpc.settings.finetune import FinetuneConfig, FinetuneQuantization, Lora
from finhpc.settings.sweep import FinetuneSweepConfig
from finhpc.training.journal import latest, read
from tests.models.dense import saved, tiny_llama
from tests.tiny import WORDS, with_tokenizer

LABELS = ("negative", "neutral", "positive")


@pytest.fixture(scope="module")
def base(run_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_tokenizer(saved(tiny_llama(context=256), tmp_path_factory.mktemp("base") / "model"), run_shards)


@pytest.fixture(scope="module")
def news(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("news") / "news.txt"
    lines = [f"{' '.join(WORDS[i % 7 : i % 7 + 3 + i % 4])} {i}@{LABELS[i % 3]}" for i in range(40)]
    file.write_text("\n".join(lines) + "\n", encoding="latin-1")
    return file


def config(base: Path | str, news: Path, storage: Path, **sections: dict[str, Any]) -> FinetuneConfig:
    tree: dict[str, Any] = {
        "model": {"path": str(base)},
        "lora": {"rank": 4},
        "data": {"source": [str(news)], "max_len": 200, "eval_fraction": 0.25},
        "parallel": {"micro_batch_size": 4},
        "optimizer": {"lr": 5e-3, "warmup_steps": 2},
        "train": {"steps": 6, "eval_every": 3, "checkpoint_every": 3},
        "run": {"name": "run", "storage": str(storage)},
    }
    for section, values in sections.items():
        tree[section] = {**tree[section], **values} if section in tree else values
    return build(FinetuneConfig, tree)


def likelihood(model: Any, base: Path, prompt: Any, label: str) -> float:
    answer = AutoTokenizer.from_pretrained(base)(" " + label).input_ids
    ids = torch.tensor([[*prompt.tolist(), *answer]])
    with torch.no_grad():
        scores = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return float(scores[range(len(answer)), answer].sum())


def losses(storage: Path) -> tuple[dict[int, float], dict[int, float]]:
    records, _ = read(storage / "run" / "journal.jsonl")
    train, val = latest(records, "train"), latest(records, "eval")
    return {i: r["train_loss"] for i, r in train.items()}, {i: r["val_loss"] for i, r in val.items()}


@pytest.mark.usefixtures("quick_training")
@pytest.mark.parametrize("lora", [{}, {"dora": True, "rslora": True}])
def test_an_adapter_that_peft_opens_and_a_resumed_run_that_is_bit_equal(
    lora: dict[str, Any], base: Path, news: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = finetune(config(base, news, tmp_path, lora=lora))
    assert result["status"] == "finished"
    assert result["params_trainable"] < result["params_dense"] / 3
    job = Finetune(config(base, news, tmp_path, lora=lora))
    examples = job.examples
    assert result["data"]["examples"] + result["data"]["held_out"] == 40
    batches = batches_of(job.config, examples)
    read_ids = [int(i) for step in range(6) for i in batches.samples(len(examples.train), step)]
    assert result["tokens"] == sum(len(examples.train.example(i)[0]) for i in read_ids)

    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    opened = PeftModel.from_pretrained(plain, result["model"]).eval()
    total, count = 0.0, 0
    golds: list[str] = []
    guesses: list[str] = []
    for i in range(len(examples.held_out)):
        tokens, answer = examples.held_out.example(i)
        ids = torch.from_numpy(tokens).long()[None]
        with torch.no_grad():
            logits = opened(ids).logits[0, :-1].log_softmax(-1)
        for place in answer.nonzero()[0].tolist():
            total -= float(logits[place - 1, ids[0, place]])
            count += 1
        guesses.append(max(LABELS, key=lambda label: likelihood(opened, base, tokens[~answer], label)))
        golds.append(AutoTokenizer.from_pretrained(base).decode(tokens[answer]).strip())
    assert result["scores"]["phrasebank"]["weighted_f1"] == pytest.approx(f1_score(golds, guesses, average="weighted"))
    assert result["held_out_weighted_f1"] == result["scores"]["phrasebank"]["weighted_f1"]
    with monkeypatch.context() as patched:  # under Ray Train: the same scores, and not by this process
        patched.delattr("finhpc.evaluation.label_scores.label_scores")
        arguments = worker_arguments(job, RunFolder(tmp_path, "run"), cuda=False)
        assert use_in_task(arguments, worker_share(job, cuda=False))["scores"] == result["scores"]
    assert total / count == pytest.approx(result["val_loss"], rel=1e-5)
    merged = load_model(result["model"])
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, opened(ids).logits, atol=1e-4, rtol=1e-4)
    assert AutoTokenizer.from_pretrained(result["model"]).decode(ids[0]).endswith(LABELS)

    assert json.loads((Path(result["model"]) / "base_fingerprint.json").read_text())["path"] == str(base)

    unbroken, weights = losses(tmp_path), load_file(Path(result["model"]) / "adapter_model.safetensors")
    run = tmp_path / "run"
    shutil.rmtree(run / "checkpoints" / "step_00000006")
    shutil.rmtree(run / "model")
    (run / "result.json").unlink()
    again = finetune(config(base, news, tmp_path, lora=lora))
    assert again["resumed_from_step"] == 3
    assert losses(tmp_path) == unbroken
    assert again["consumed_sha256"] == result["consumed_sha256"]
    resumed = load_file(Path(again["model"]) / "adapter_model.safetensors")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in weights.items())


@pytest.mark.usefixtures("quick_training")
@pytest.mark.slow
def test_two_stages_by_two_replicas_of_a_4_bit_base(base: Path, news: Path, tmp_path: Path) -> None:
    sections = {"quantization": {"bits": 4}, "data": {"source": [str(news)], "max_len": 200, "eval_fraction": 0.25}}
    one = finetune(config(base, news, tmp_path / "one", **sections))
    parallel = {"stages": 2, "replicas": 2, "micro_batch_size": 2, "shard_optimizer": True}
    four = finetune(config(base, news, tmp_path / "four", parallel=parallel, **sections))
    assert four["consumed_sha256"] == one["consumed_sha256"]
    assert four["scores"].keys() == one["scores"].keys() == {"phrasebank"}
    for mine, plain in zip(losses(tmp_path / "four"), losses(tmp_path / "one"), strict=True):
        assert mine == pytest.approx(plain, rel=1e-4)


@pytest.mark.usefixtures("quick_training")
def test_a_sweep_quantises_the_base_once(base: Path, news: Path, tmp_path: Path) -> None:
    own = finetune(config(base, news, tmp_path, quantization={"bits": 4}))
    tree = config(base, news, tmp_path).model_dump(mode="json", exclude_unset=True)
    tree["run"]["name"] = "ranks"
    tree |= {"quantization": {"bits": 4}, "grid": {"lora.rank": [2, 4]}, "sweep": {"concurrent": 1}}
    settings = build(FinetuneSweepConfig, tree)
    result = sweep(settings)
    assert [row["status"] for row in result["trials"]] == ["finished"] * 2
    (shared,) = (tmp_path / "ranks" / "shared").iterdir()
    assert shared.name.startswith("base-")
    trials = tmp_path / "ranks" / "trials"
    assert {run.name for run in trials.iterdir() if (run / "quantized").resolve() == shared} == {"rank2", "rank4"}
    found = {row["trial"]: row for row in result["trials"]}
    assert found["rank4"]["val_loss"] == own["val_loss"], "as a run of its own, which quantises for itself"

    # One trial is to be run again: it takes what is there.
    shutil.rmtree(trials / "rank2")
    before = (shared / "weights_sha256.json").stat().st_mtime_ns
    again = {row["trial"]: row for row in sweep(settings)["trials"]}
    assert again["rank2"]["val_loss"] == found["rank2"]["val_loss"]
    assert (trials / "rank2" / "quantized").resolve() == shared
    assert (shared / "weights_sha256.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("train", "eval_fraction", "told"),
    [
        ({"best_by": "val_loss"}, 0.0, r"train.best_by=val_loss compares evaluations, and no examples are held out"),
        ({"patience": 2}, 0.25, r"train.patience=2 waits for better evaluations, .* use train.best_by=val_loss"),
        ({"patience": 2, "best_by": "val_loss", "eval_every": 0}, 0.25, r"train.eval_every=0 has only one"),
    ],
)
def test_the_best_of_nothing_is_refused(
    train: dict[str, Any], eval_fraction: float, told: str, base: Path, news: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=told):
        Finetune(config(base, news, tmp_path, train=train, data={"eval_fraction": eval_fraction}))


@pytest.mark.usefixtures("quick_training")
def test_a_run_continues_from_an_adapter_of_this_base(base: Path, news: Path, run_shards: Path, tmp_path: Path) -> None:
    first = finetune(config(base, news, tmp_path / "first"))
    more = {"lora": {"path": first["model"]}, "optimizer": {"lr": 1e-12}}
    second = finetune(config(base, news, tmp_path / "second", **more))
    assert second["val_loss"] == pytest.approx(first["val_loss"], rel=1e-5)
    file = Path(first["model"]) / "adapter_model.safetensors"
    kept = file.read_bytes()
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file)
    with pytest.raises(ConfigError, match="is not the model that the run started from"):
        finetune(config(base, news, tmp_path / "second", **more))
    file.write_bytes(kept)
    assert finetune(config(base, news, tmp_path / "second", **more)) == second
    other = with_tokenizer(saved(tiny_llama(context=128), tmp_path / "other"), run_shards)
    with pytest.raises(ConfigError, match=f"was trained with {base} "):
        Finetune(config(other, news, tmp_path / "third", data={"max_len": 100}, **more))


def test_epochs_say_the_steps(base: Path, news: Path, tmp_path: Path) -> None:
    train = {"epochs": 2.0, "eval_every": 3}
    settings = config(base, news, tmp_path)
    settings = build(FinetuneConfig, settings.model_dump() | {"train": train})
    job = Finetune(settings)
    assert job.config.train.steps == round(2 * len(job.examples.train) / 4)
    train["steps"] = 3
    with pytest.raises(ConfigError, match=r"train.steps=3 and train.epochs=2"):
        Finetune(build(FinetuneConfig, settings.model_dump() | {"train": train}))


def test_every_problem_is_told_at_once(base: Path, news: Path, tmp_path: Path) -> None:
    bad = config(base, news, tmp_path, lora={"targets": ["nothing"]}, parallel={"stages": 9}, data={"max_len": 10**6})
    with pytest.raises(ConfigError) as raised:
        Finetune(bad)
    text = str(raised.value)
    assert "lora.targets=nothing matches no linear layer" in text
    assert "parallel.stages=9" in text
    assert "data.max_len=1000000" in text


@pytest.mark.parametrize(
    ("path", "told"), [("", "model.path is not set"), ("nowhere.gguf", "does not exist")], ids=["none", "missing"]
)
def test_a_base_that_is_not_there_hides_no_other_problem(path: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=told) as raised:
        Finetune(config(path, tmp_path / "nowhere.txt", tmp_path))
    assert "nowhere.txt does not exist; give a file" in str(raised.value)


def test_a_base_without_tokeniser(news: Path, tmp_path: Path) -> None:
    folder = saved(tiny_llama(), tmp_path / "bare")
    with pytest.raises(ConfigError, match=r"comes without a tokenizer"):
        Finetune(config(folder, news, tmp_path))


def test_other_data_under_the_same_name_is_refused(base: Path, news: Path, tmp_path: Path) -> None:
    from finhpc.runs.folder import RunFolder

    job = Finetune(config(base, news, tmp_path))
    folder = RunFolder(tmp_path, "run")
    with folder.lock():
        folder.write_config(job.config, *job.fingerprints)
    changed = tmp_path / "other.txt"
    changed.write_text(news.read_text(encoding="latin-1").replace("@neutral", "@positive"), encoding="latin-1")
    other = Finetune(config(base, changed, tmp_path))
    with pytest.raises(ConfigError, match=r"data.source=.*other.txt has other data"):
        folder.check_resume(other.config, *other.fingerprints)
    assert json.loads((tmp_path / "run" / "identity.json").read_text())["model_fingerprint"]


def test_evaluate_takes_the_base_as_it_was_in_training(base: Path, tmp_path: Path) -> None:
    weights, lora = open_weights(base), Lora(rank=2)
    draw = torch.Generator().manual_seed(0)
    trained = {}
    for name, (out, inside) in target_shapes(weights.skeleton, lora, 4).items():
        trained[f"{name}.A"] = torch.randn(2, inside, generator=draw) * 0.1
        trained[f"{name}.B"] = torch.randn(out, 2, generator=draw) * 0.1
    save_adapter(tmp_path / "adapter", lora, trained, weights, FinetuneQuantization(bits=4))
    scored, _ = load_for_evaluation(str(base), str(tmp_path / "adapter"), "float32")
    beside_float = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter").eval()
    ids = torch.arange(10)[None]
    with torch.no_grad():
        wanted = load_model(tmp_path / "adapter")(ids).logits
        torch.testing.assert_close(scored(ids).logits, wanted)
        assert not torch.allclose(beside_float(ids).logits, wanted, atol=1e-3)


@pytest.mark.usefixtures("ray_cluster")
def test_a_low_rank_base_from_parquet_to_a_merged_export(run_shards: Path, news: Path, tmp_path: Path) -> None:
    """The merged export, in transformers' own architecture, has the loss that the run reported."""
    dense = as_low_rank(tiny_llama(context=256).config, {"attention": 12, "mlp": 16})
    model = initial_model(dense, 3, "spectral")
    state = {name: value.clone() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    low_rank = tmp_path / "low-rank"
    save_model(low_rank, model.config, state.items(), run_shards / "tokenizer")
    lines = [line.rpartition("@") for line in news.read_text(encoding="latin-1").splitlines()]
    table = pa.Table.from_pylist([{"sentence": text, "label": label} for text, _, label in lines])
    pq.write_table(table, tmp_path / "news.parquet")
    settings = config(low_rank, tmp_path / "news.parquet", tmp_path, train={"steps": 4})
    result = finetune(settings)
    assert result["status"] == "finished"
    assert result["scores"], "labels are scored with a low-rank base, too"
    export(ExportConfig(model=result["model"], format="merged", out=str(tmp_path / "out")))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(merged) is type(tiny_llama())
    examples = Finetune(settings).examples
    assert val_loss(merged, examples.held_out) == pytest.approx(result["val_loss"], rel=1e-5)
    assert val_loss(load_model(low_rank), examples.held_out) > result["val_loss"] * 1.01, "something was learned"


def val_loss(model: Any, held_out: Any) -> float:
    total, count = 0.0, 0
    for i in range(len(held_out)):
        tokens, answer = held_out.example(i)
        ids = torch.from_numpy(tokens).long()[None]
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].log_softmax(-1)
        for place in answer.nonzero()[0].tolist():
            total -= float(logits[place - 1, ids[0, place]])
            count += 1
    return total / count


def test_a_low_rank_model_does_not_take_an_adapter_up_in_memory() -> None:
    model = skeleton(as_low_rank(tiny_llama().config, {"mlp": 4}))
    name = "model.layers.0.mlp.up_proj"
    with pytest.raises(ConfigError, match=r"base is low-rank .*export --format merged"):
        merge_adapter(model, Adapter({name: (torch.zeros(2, 32), torch.zeros(48, 2))}, {name: 1.0}))
