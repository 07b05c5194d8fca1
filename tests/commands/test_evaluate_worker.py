"""What a worker of evaluate scores of models of ours is what plain lm-eval scores of the same weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.evaluator import evaluate as lm_evaluate
from lm_eval.models.huggingface import HFLM
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from finhpc.cluster.package import Driver
from finhpc.commands.evaluate.worker import Pair, Scorer
from finhpc.commands.export import export
from finhpc.errors import ImplausibleError
from finhpc.evaluation.models import subjects
from finhpc.evaluation.tasks import SOURCES, load_task, prepare_tasks
from finhpc.models.loading import load_model
from finhpc.quantization.fake import round_weights
from finhpc.settings.base import build
from finhpc.settings.evaluate import EvaluateConfig
from finhpc.settings.export import ExportConfig
from tests.evaluation.tasks import write_data
from tests.generation.folders import tiny_folder

TASKS = ["fpb", "boolq"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("worker")
    write_data(folder / "data")
    tiny_folder(folder / "dense", "llama")
    tiny_folder(folder / "low-rank", "llama", "low_rank")
    return folder


def scored(place: Path, out: Path, model: Path, tasks: list[str] = TASKS, **other: Any) -> dict[str, list[list[float]]]:
    """Task -> likelihoods of every example's answers."""
    import pyarrow.parquet as pq

    tree = {"model": [str(model)], "tasks": tasks, "data": {"folder": str(place / "data")}, "bootstrap": 0, **other}
    config = build(EvaluateConfig, tree)
    (subject,) = subjects(config.model, config.adapter)
    scorer, found = Scorer(config, cuda=False, driver=Driver.here()), {}
    for task in prepare_tasks(config, out / "tasks"):
        pair = Pair(subject, task, out / task.name, "")
        assert scorer.score(pair) is None
        found[task.name] = [row["log_likelihoods"] for row in pq.read_table(out / f"{task.name}.parquet").to_pylist()]
        assert (pair.read() or {})["examples"] == len(found[task.name])
    return found


def plainly(place: Path, out: Path, model: Any, folder: Path, tasks: list[str] = TASKS) -> dict[str, list[list[float]]]:
    """The same by lm-eval alone, of a model in transformers' own architecture."""
    tree = {"model": [str(folder)], "tasks": tasks, "data": {"folder": str(place / "data")}}
    lm = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=4)
    found = {}
    for task in prepare_tasks(build(EvaluateConfig, tree), out / "plain-tasks"):
        opened = load_task(task)
        opened.set_config(key="num_fewshot", value=0)
        result: Any = lm_evaluate(lm, {task.name: opened}, bootstrap_iters=0, log_samples=True)
        samples = sorted(result["samples"][task.name], key=lambda sample: sample["doc_id"])
        found[task.name] = [[float(answer[0]) for answer in sample["filtered_resps"]] for sample in samples]
        accuracy = result["results"][task.name]["acc,none"]
        assert accuracy == sum(sample["acc"] for sample in samples) / len(samples)
    return found


def assert_same(ours: dict[str, list[list[float]]], theirs: dict[str, list[list[float]]], tolerance: float) -> None:
    assert set(ours) == set(theirs)
    for task in ours:
        for row, wanted in zip(ours[task], theirs[task], strict=True):
            assert row == pytest.approx(wanted, abs=tolerance)


def test_a_broken_model_gets_no_scores(place: Path, tmp_path: Path) -> None:
    """Of a model whose weights are another's numbers, every task and perplexity fail, and nothing is written."""
    folder = shutil.copytree(place / "dense", tmp_path / "broken")
    for scale, said in ((1e3, "loss="), (float("nan"), "is not a number")):
        tensors = load_file(place / "dense" / "model.safetensors")
        tensors["lm_head.weight"] *= scale
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        shards = {"shards": str(place / "dense-shards"), "seq_len": 32}
        tree = {"model": [str(folder)], "tasks": ["fpb", "boolq"], "data": {"folder": str(place / "data"), **shards}}
        config = build(EvaluateConfig, tree | {"bootstrap": 5})
        (subject,) = subjects(config.model, config.adapter)
        scorer = Scorer(config, cuda=False, driver=Driver.here())
        for task in (*prepare_tasks(config, tmp_path / "tasks"), None):
            pair = Pair(subject, task, tmp_path / "scores" / (task.name if task else "perplexity"), "")
            error = scorer.score(pair)
            assert isinstance(error, ImplausibleError)
            assert said in str(error)
            assert pair.read() is None


def test_every_task_scores_as_by_lm_eval_alone(place: Path, tmp_path: Path) -> None:
    """In this process; that lm-eval's own command does so stands in tests/evaluation/test_scores.py (slow)."""
    model, tasks = load_model(place / "dense"), list(SOURCES)
    ours = scored(place, tmp_path, place / "dense", tasks)
    assert_same(ours, plainly(place, tmp_path, model, place / "dense", tasks), 1e-4)
    assert len(ours) == 7


def test_a_low_rank_model_scores_as_its_merged_export(place: Path, tmp_path: Path) -> None:
    export(ExportConfig(model=str(place / "low-rank"), format="merged", out=str(tmp_path / "merged")))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert type(merged).__name__ == "LlamaForCausalLM"
    ours = scored(place, tmp_path, place / "low-rank")
    assert_same(ours, plainly(place, tmp_path, merged, tmp_path / "merged"), 1e-3)


@pytest.mark.parametrize("on_the_fly", [True, False])
def test_a_packed_model_scores_as_its_rounded_weights(place: Path, tmp_path: Path, on_the_fly: bool) -> None:
    quantization = {"bits": 4, "scheme": "minmax"}
    if on_the_fly:
        ours = scored(place, tmp_path, place / "dense", quantization=quantization)
        assert not list(tmp_path.glob(".*quantized")), "what was exported to be scored is gone"
    else:
        export(ExportConfig(model=str(place / "dense"), out=str(tmp_path / "q"), quantization=quantization))
        ours = scored(place, tmp_path, tmp_path / "q")
    rounded = load_model(place / "dense")
    exact = plainly(place, tmp_path, rounded, place / "dense")
    with torch.no_grad():
        round_weights(rounded, 4)
    theirs = plainly(place, tmp_path, rounded, place / "dense")
    assert_same(ours, theirs, 1e-3)
    assert exact["fpb"][0] != pytest.approx(theirs["fpb"][0], abs=0.1), "rounding matters"


@pytest.mark.parametrize(("bits", "scheme"), [(8, "int8"), (4, "nf4")])
def test_bitsandbytes_models_score_as_lm_eval_has_them(place: Path, tmp_path: Path, bits: int, scheme: str) -> None:
    quantization = {"bits": bits, "scheme": scheme}
    export(
        ExportConfig(model=str(place / "dense"), format="merged", out=str(tmp_path / "q"), quantization=quantization)
    )
    ours = scored(place, tmp_path, place / "dense", quantization=quantization)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "q").eval()
    assert_same(ours, plainly(place, tmp_path, plain, tmp_path / "q"), 0.05)
