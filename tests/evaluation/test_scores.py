from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finhpc.data.examples.templates import template
from finhpc.evaluation.language_model import LanguageModel
from finhpc.evaluation.models import load_for_evaluation
from finhpc.evaluation.scores import score
from finhpc.evaluation.tasks import SOURCES, load_task, prepare_tasks
from finhpc.settings.base import build
from finhpc.settings.evaluate import EvaluateConfig
from tests.evaluation.tasks import write_data, write_model


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    write_data(folder / "data")
    write_model(folder / "model")
    return folder


def config(place: Path, **other: object) -> EvaluateConfig:
    tree = {"model": [str(place / "model")], "tasks": list(SOURCES), "data": {"folder": str(place / "data")}}
    return build(EvaluateConfig, tree | other)


@pytest.mark.slow
def test_scores_are_those_of_lm_evals_own_command(place: Path) -> None:
    tasks = prepare_tasks(config(place), place / "tasks")
    model, tokenizer = load_for_evaluation(str(place / "model"))
    ours = {task.name: score(LanguageModel(model, tokenizer, 4), task, 20, 0) for task in tasks}
    words = ["--model", "hf", "--model_args", f"pretrained={place / 'model'},dtype=float32", "--device", "cpu"]
    names = ",".join(task.name for task in tasks)
    files = ["--include_path", str(place / "tasks"), "--output_path", str(place / "out"), "--log_samples"]
    command = [sys.executable, "-m", "lm_eval", *words, "--tasks", names, "--batch_size", "4", *files]
    # Process groups of earlier tests leave their variables, which would make this a distributed evaluation.
    group = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in group}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(next((place / "out").rglob("results_*.json")).read_text())["results"]
    for name, (scores, rows) in ours.items():
        assert scores["acc"] == results[name]["acc,none"]
        if "f1,none" in results[name]:
            assert scores["weighted_f1"] == results[name]["f1,none"]
        samples = next((place / "out").rglob(f"samples_{name}_*.jsonl")).read_text().splitlines()
        for row, sample in zip(rows, map(json.loads, samples), strict=True):
            theirs = [float(answer[0]) for answer in sample["filtered_resps"]]
            assert row["log_likelihoods"] == pytest.approx(theirs, rel=1e-6)  # their sums are float32
            assert row["acc"] == sample["acc"]


@pytest.mark.parametrize(
    ("task", "name"), [("fpb", "phrasebank"), ("fiqa_sa", "fiqa"), ("tfns", "tfns"), ("ner", "ner")]
)
def test_prompts_are_those_of_finetuning(place: Path, tmp_path: Path, task: str, name: str) -> None:
    opened = load_task(prepare_tasks(config(place, tasks=[task]), tmp_path)[0])
    for doc in opened.eval_docs:
        assert opened.doc_to_text(doc) == template(name).render(doc).prompt
        assert tuple(opened.doc_to_choice(doc)) == template(name).labels
    assert opened.config.target_delimiter == template(name).separator


def test_boolqs_prompt_is_lm_evals_own_with_the_titled_passage(place: Path, tmp_path: Path) -> None:
    import lm_eval.tasks
    from jinja2 import Template
    from lm_eval.tasks._yaml_loader import load_yaml

    rows = [{"question": "is it so", "title": "A thing", "passage": "It is\nso.", "answer": True}]
    rows += [{"question": "is it not", "passage": "It is.", "answer": False}]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = config(place, tasks=["boolq"], data={"files": {"boolq": str(tmp_path / "b.jsonl")}})
    opened = load_task(prepare_tasks(settings, tmp_path / "tasks")[0])
    own: Any = load_yaml(Path(lm_eval.tasks.__file__).parent / "super_glue/boolq/default.yaml", resolve_func=False)
    # The columns of SuperGLUE, as lm-eval's definition reads them.
    there = [
        {"question": "is it so", "passage": "A thing -- It is\nso.", "label": 1},
        {"question": "is it not", "passage": "It is.", "label": 0},
    ]
    for doc, theirs in zip(opened.eval_docs, there, strict=True):
        assert opened.doc_to_text(doc) == Template(own["doc_to_text"], keep_trailing_newline=True).render(theirs)
        assert opened.doc_to_choice(doc) == own["doc_to_choice"] == ["no", "yes"]
        assert opened.doc_to_target(doc) == theirs["label"]
    assert opened.doc_to_text(opened.eval_docs[0]) == "A thing -- It is\nso.\nQuestion: is it so?\nAnswer:"
    assert opened.config.target_delimiter == own.get("target_delimiter", " ")


def test_prompts_longer_than_the_context_are_counted(place: Path, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "short", positions=24)
    task = prepare_tasks(config(place, tasks=["fpb"]), tmp_path / "tasks")[0]
    model, tokenizer = load_for_evaluation(str(folder))
    scores, rows = score(LanguageModel(model, tokenizer, 4), task, 0, 0)
    assert scores["cut"] == len(rows) == 6
    assert scores["ci95"] is None


def test_limit_draws_by_the_seed(place: Path, tmp_path: Path) -> None:
    drawn = [
        prepare_tasks(config(place, tasks=["tfns"], limit=3, seed=seed), tmp_path / str(i))[0].path.with_suffix(
            ".jsonl"
        )
        for i, seed in enumerate((0, 0, 1))
    ]
    first, again, other = (path.read_text() for path in drawn)
    assert first == again != other
    assert len(first.splitlines()) == 3
