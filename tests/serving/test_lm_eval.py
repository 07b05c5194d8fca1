"""lm-eval's own command scores a running endpoint as `finhpc evaluate` scores the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finhpc.evaluation.language_model import LanguageModel
from finhpc.evaluation.models import load_for_evaluation
from finhpc.evaluation.scores import score
from finhpc.evaluation.tasks import prepare_tasks
from finhpc.settings.base import build
from finhpc.settings.evaluate import EvaluateConfig
from tests.evaluation.tasks import write_data, write_model
from tests.models.folders import peft_adapter
from tests.serving.server import TOKEN, config_of, serving

NAMES = ["fpb", "ner", "boolq", "piqa", "winogrande"]
CONTEXT = 1024


def lm_eval(url: str, model: str, folder: Path, out: Path) -> dict[str, Any]:
    """Results by task, each with its `samples`, of `lm_eval` in a process that reaches no model hub."""
    arguments = f"model={model},base_url={url}/completions,tokenizer={folder / 'model'},tokenizer_backend=huggingface"
    words = ["--model", "local-completions", "--model_args", f"{arguments},max_length={CONTEXT},max_retries=1"]
    words += ["--tasks", ",".join(NAMES), "--include_path", str(folder / "tasks"), "--batch_size", "4"]
    words += ["--output_path", str(out), "--log_samples"]
    # Process groups of earlier tests leave their variables, which would make this a distributed evaluation.
    group = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in group}
    environment |= {"OPENAI_API_KEY": TOKEN, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "lm_eval", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    results: dict[str, Any] = json.loads(next(out.rglob("results_*.json")).read_text())["results"]
    for name in NAMES:
        rows = next(out.rglob(f"samples_{name}_*.jsonl")).read_text().splitlines()
        results[name]["samples"] = [json.loads(row) for row in rows]
    return results


@pytest.mark.slow
def test_scores_of_the_endpoint_are_those_of_evaluate(tmp_path: Path) -> None:
    data, model = write_data(tmp_path / "data"), write_model(tmp_path / "model", positions=CONTEXT)
    adapter = peft_adapter(model, tmp_path / "adapter", target_modules=["c_attn"])
    tree = {"model": [str(model)], "tasks": NAMES, "data": {"folder": str(data)}}
    tasks = prepare_tasks(build(EvaluateConfig, tree), tmp_path / "tasks")
    found: dict[str | None, Any] = {}
    with serving(config_of(model, tmp_path / "state", {"a": adapter}, **{"cache.bytes": 32 << 20})) as server:
        for name in ("base", "base:a"):
            found[name] = lm_eval(server.url, name, tmp_path, tmp_path / name.replace(":", "-"))
    likelihoods = set()
    for name, path in (("base", None), ("base:a", str(adapter))):
        opened = LanguageModel(*load_for_evaluation(str(model), path), 4)
        for task in tasks:
            scores, rows = score(opened, task, 20, 0)
            theirs = found[name][task.name]
            assert scores["acc"] == theirs["acc,none"], (name, task.name)
            if "f1,none" in theirs:
                assert scores["weighted_f1"] == theirs["f1,none"]
            for row, sample in zip(rows, theirs["samples"], strict=True):
                values = [float(answer[0]) for answer in sample["filtered_resps"]]
                assert values == pytest.approx(row["log_likelihoods"], abs=1e-3)
                likelihoods.add(values[0])
    assert len(likelihoods) > len(NAMES), "the adapter and the examples must differ"
