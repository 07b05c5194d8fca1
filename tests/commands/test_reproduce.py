"""A reproduction: references between steps, what is checked before, a kill in the middle, a step that fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from finhpc.commands.reproduce.command import reproduce
from finhpc.commands.reproduce.measure import figures
from finhpc.commands.reproduce.recipe import AbsentError, merged, read_recipe, resolve
from finhpc.errors import ConfigError, TrainingFailedError
from finhpc.settings.base import build, recipes
from finhpc.settings.reproduce import Recipe, ReproduceConfig
from finhpc.training.journal import read
from tests.evaluation.tasks import write_data
from tests.waiting import wait_until

PRETRAIN: dict[str, Any] = {
    "model": {"preset": "gpt2-tiny", "layers": 2, "width": 32, "heads": 2, "context": 64},
    "data": {"seq_len": 32, "eval_samples": 8},
    "train": {"steps": 6, "eval_every": 3, "checkpoint_every": 0},
    "optimizer": {"warmup_steps": 2},
}


def write_recipe(path: Path, shards: Path, steps: list[dict[str, Any]], **about: Any) -> str:
    defaults = {"pretrain": PRETRAIN | {"data": PRETRAIN["data"] | {"shards": str(shards)}}}
    path.write_text(yaml.safe_dump({"defaults": defaults, "steps": steps} | about))
    return str(path)


def settings(tmp_path: Path, scale: str, **about: Any) -> ReproduceConfig:
    run = {"name": "r", "storage": str(tmp_path / "runs"), "experiment": "reproduce"}
    return build(ReproduceConfig, {"scale": scale, "run": run} | about)


def test_references_are_replaced_and_what_is_absent_is_left_out() -> None:
    known = {
        "a": {"model": "A", "files": {"x": 1}},
        "b": None,
        "finance": ["p", "q"],
        "base": "${a.model}",
        "text": None,
    }
    dropped: list[str] = []
    tree = {"model": ["${a.model}", "${b.model}"], "s": ["${finance}", "r"], "f": "${a.files}", "k": "costs ${a.x}"}
    made = resolve(tree | {"base": "${base}"}, known, dropped)
    assert made == {"model": ["A"], "s": ["p", "q", "r"], "f": {"x": 1}, "k": "costs ${a.x}", "base": "A"}
    assert dropped == ["b"]
    with pytest.raises(AbsentError, match="text"):
        resolve({"s": ["${text}"]}, known, [])
    with pytest.raises(AbsentError, match="b"):
        resolve({"base": "${base}"}, known | {"base": "${b.model}"}, [])
    with pytest.raises(ConfigError, match=r"\$\{a.modle\}: the result of a has no modle; it has: model, files"):
        resolve("${a.modle}", known, [])


def test_a_steps_settings_lie_over_its_verbs_and_a_path_brings_its_own_shape() -> None:
    step = {"name": "two", "verb": "pretrain", "settings": {"train": {"steps": 9}, "model": {"path": "${one.model}"}}}
    recipe = build(Recipe, {"defaults": {"pretrain": PRETRAIN}, "steps": [step]})
    tree = merged(recipe, recipe.steps[0])
    assert tree["train"] == PRETRAIN["train"] | {"steps": 9}
    assert tree["model"] == {"path": "${one.model}"}
    assert recipe.defaults["pretrain"]["train"]["steps"] == 6


def test_every_problem_of_the_recipe_is_named_at_once(tmp_path: Path, run_shards: Path) -> None:
    steps = [
        {"name": "one", "verb": "pretrian"},
        {"name": "two", "verb": "pretrain", "settings": {"model": {"path": "${three.model}"}}},
        {"name": "two", "verb": "measure", "settings": {"model": ["${one.model}", "${onn.model}"]}},
        {"name": "three", "verb": "pretrain"},
    ]
    scale = write_recipe(tmp_path / "r.yaml", run_shards, steps, inputs={"txt": []})
    with pytest.raises(ConfigError) as caught:
        reproduce(settings(tmp_path, scale))
    assert caught.value.problems == [
        "inputs.txt is not an input; did you mean 'text'?",
        "step one: unknown command 'pretrian'; did you mean 'pretrain'?",
        "step two occurs twice; rename one.",
        "step two: ${three} is a later step; put it before.",
        "step two: ${onn} is neither an input nor a step; did you mean 'one'?",
    ]
    with pytest.raises(ConfigError, match=r"scale=cpuu is not a scale; did you mean 'cpu'\? Or give a YAML file"):
        read_recipe("cpuu")


def test_every_problem_of_every_step_is_named_before_anything_starts(tmp_path: Path, run_shards: Path) -> None:
    steps = [
        {"name": "text", "verb": "prepare"},
        {"name": "dense", "verb": "pretrain", "settings": {"method": {"kind": "dense"}, "parallel": {"stages": 9}}},
        {
            "name": "svd",
            "verb": "pretrain",
            "settings": {"model": {"path": "${dense.model}"}, "method": {"kind": "svd", "rank": 900}},
        },
        {"name": "odd", "verb": "evaluate", "settings": {"model": ["${svd.model}"], "tsks": []}},
        {"name": "scores", "verb": "evaluate", "settings": {"model": ["${svd.modle}"], "tasks": ["perplexity"]}},
        {"name": "held", "verb": "hold_out", "settings": {"source": ["${finance}"]}},
    ]
    steps[0] |= {"name": "shards", "settings": {"source": ["${text}"]}}
    scale = write_recipe(tmp_path / "r.yaml", run_shards, steps)
    with pytest.raises(ConfigError) as caught:
        reproduce(settings(tmp_path, scale, text=["/no/such/text"], finance=["/no/such/news.txt"]), dry_run=True)
    text = str(caught.value)
    for part in (
        "step shards: source=/no/such/text does not exist",
        "step dense: parallel.stages=9",
        "step svd: method.rank=900",
        "step odd: tsks is not a setting; did you mean 'tasks'?",
        "step scores: ${svd.modle}: the result of svd has no modle",
        "step held: data.source=/no/such/news.txt does not exist",
    ):
        assert part in text, text
    with pytest.raises(ConfigError, match="boolq"):
        reproduce(settings(tmp_path, scale, text=[str(tmp_path)], general=str(tmp_path)), dry_run=True)
    assert not (tmp_path / "runs").exists(), "a dry run writes nothing"


def test_the_scales_that_ship_check_out(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert {"reproduce/cpu", "reproduce/paper"} <= set(recipes())
    (tmp_path / "text.txt").write_text("The bank rate rises and falls. " * 50)
    data = write_data(tmp_path / "data", 40)
    given = {
        "text": [str(tmp_path / "text.txt")],
        "general": str(data),
        "finance": [str(data / name) for name in ("fpb.txt", "tfns.csv", "fiqa.json")],
    }
    small = reproduce(settings(tmp_path, "cpu", **given), dry_run=True)
    assert {row["state"] for row in small["steps"]} == {"to do"}
    assert small["does_not_fit"] == []
    rows = {row["step"]: row for row in small["steps"]}
    assert rows["dense"]["params"] > rows["method1-r64"]["params"] == rows["method2-r64"]["params"]
    assert rows["method1-r64"]["tokens"] == 800 * 4 * 256
    big = reproduce(settings(tmp_path, "paper", **given), dry_run=True)
    rows = {row["step"]: row for row in big["steps"]}
    assert [round(rows[f"127m-method2-r{rank}"]["params"] / 1e5) for rank in (192, 96, 48)] == [776, 586, 490]
    assert [round(rows[f"1500m-method1-r{rank}"]["params"] / 1e6) for rank in (384, 192, 96)] == [575, 329, 206]
    trained = {name: rows[name]["params"] for name in ("7b-r4", "7b-r8-4bit", "13b-r8-8bit", "13b-r16")}
    assert [round(count / 1e5) for count in trained.values()] == [21, 42, 98, 197], "Table IX: 2.1, 4.2, 9.8, 19.6 M"
    assert not any(row["notes"] for row in big["steps"])
    assert rows["1500m-dense"]["hours"] > 10 * rows["127m-dense"]["hours"] > 0
    assert {row["state"] for row in big["steps"]} == {"to do"}
    assert "meta-llama/Llama-2-13b-hf (the hub)" in rows["13b-r8"]["unchecked"]
    smaller = tmp_path / "v100.yaml"
    smaller.write_text(recipes()["reproduce/paper"].read_text().replace("a100-80gb", "v100-32gb"))
    noted = reproduce(settings(tmp_path, str(smaller), **given), dry_run=True)["steps"]
    assert "v100-32gb has 32" in next(row["notes"][0] for row in noted if row["step"] == "1500m-dense")
    left = reproduce(settings(tmp_path, "cpu", text=given["text"]), dry_run=True)["steps"]
    why = {row["step"]: row["why"] for row in left if row["state"] == "left out"}
    assert {name for name, reason in why.items() if reason == "general is not given"} >= {"pretrained-general"}
    assert why["lora-r8"] == why["base-speed"] == why["tuned-finance"] == "finance is not given"
    assert not {"dense", "method3-r64", "pretrained-speed"} & set(why)
    assert "not checked before its step runs: hf:tatsu-lab/alpaca (the hub); meta-llama/" in capfd.readouterr().err


def starts(storage: Path, name: str) -> int:
    return sum(record["kind"] == "start" for record in read(storage / name / "journal.jsonl")[0])


@pytest.mark.usefixtures("quick_training")
@pytest.mark.parametrize("killed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_it_goes_past_a_step_that_fails_and_on_after_a_kill(tmp_path: Path, run_shards: Path, killed: bool) -> None:
    storage = tmp_path / "runs"
    models = ["${dense.model}", "${second.model}", "${broken.model}"]
    data = {"shards": str(run_shards), "seq_len": 32}
    scores = {"model": models, "tasks": ["perplexity"], "data": data, "limit": 4, "resources": {"device": "cpu"}}
    steps: list[dict[str, Any]] = [
        {"name": "dense", "verb": "pretrain", "settings": {"method": {"kind": "dense"}}},
        {
            "name": "second",
            "verb": "pretrain",
            "settings": {
                "model": {"path": "${dense.model}"},
                "method": {"kind": "svd", "rank": 4},
                "train": {"steps": 400, "eval_every": 0, "checkpoint_every": 0},
            },
        },
        {"name": "broken", "verb": "decompose", "settings": {"model": "${dense.model}", "rank": 900}},
        {
            "name": "scores",
            "verb": "evaluate",
            "settings": scores,
        },
        {"name": "after", "verb": "measure", "settings": {"model": ["${broken.model}"]}},
        {"name": "speed", "verb": "measure", "settings": {"model": models[:2], "bits": [8], "prompt": 9, "new": 5}},
        {"name": "report", "verb": "report"},
    ]
    scale = write_recipe(tmp_path / "r.yaml", run_shards, steps)
    kept = kill_in_second_step(tmp_path, scale) if killed else None
    with pytest.raises(TrainingFailedError, match=r"1 of 7 steps failed: broken \(.*rank=900"):
        reproduce(settings(tmp_path, scale))
    assert kept in (None, (storage / "r-dense" / "journal.jsonl").read_bytes()), "found finished"
    result = json.loads((storage / "r" / "result.json").read_text())
    assert result["status"] == "failed"
    became = {row["step"]: row["status"] for row in result["steps"]}
    assert became == {"broken": "failed", "after": "not run"} | dict.fromkeys(
        ("dense", "second", "scores", "speed", "report"), "finished"
    )

    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    experiment = client.get_experiment_by_name("reproduce")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    runs = {run.info.run_name: run for run in found}
    assert set(runs) == {"r-dense", "r-second", "r-scores", "r-scores/r-dense", "r-scores/r-second"}
    assert len(found) == 5, "a kill leaves no second run of a name"
    of_second = runs["r-second"].data
    assert of_second.params["method.kind"] == "svd"
    trained = ("val_loss", "params_total", "compression_ratio", "worker_hours", "tokens_per_s", "wall_s")
    made = ("size_bytes", "size_8bit_bytes", "size_16bit_bytes", "generate_tokens_per_s", "generate_8bit_tokens_per_s")
    for name in (*trained, *made, "peak_memory_bytes_worker0", "evaluate/perplexity/perplexity"):
        assert of_second.metrics[name] > 0, name
    measured = json.loads((storage / "r-speed" / "result.json").read_text())
    own = next(row for row in measured["models"] if "second" in row["model"] and row["bits"] == 16)
    assert own["size_bytes"] == of_second.metrics["size_bytes"] > of_second.metrics["size_8bit_bytes"]

    steps[2:5] = [steps[3] | {"settings": scores | {"model": models[:2]}}]
    write_recipe(tmp_path / "r.yaml", run_shards, steps)
    before = (storage / "r-speed" / "result.json").read_bytes()
    again = reproduce(settings(tmp_path, scale))
    assert again["status"] == "finished"
    table = (Path(again["report"]) / "table-vii.csv").read_text()
    assert again["report"] == str(storage / "r-report")
    assert str(of_second.metrics["params_total"]) in table, "made from what MLflow holds"
    assert (storage / "r-speed" / "result.json").read_bytes() == before, "not measured again"
    assert len(client.search_runs([experiment.experiment_id])) == 5


def kill_in_second_step(tmp_path: Path, scale: str) -> bytes:
    """Start the command with a Ray of its own and kill it in the second step; the first step's journal."""
    storage = tmp_path / "runs"
    words = [sys.executable, "-m", "finhpc.cli", "reproduce", "--scale", scale, "--run.storage", str(storage)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["HOME"] = str(tmp_path)
    with open(tmp_path / "log", "wb") as log:
        first = subprocess.Popen([*words, "--run.name", "r"], stdout=log, stderr=log, env=environment)
        try:
            wait_until(lambda: starts(storage, "r-second") > 0, first, tmp_path / "log")
        finally:
            first.kill()
            first.wait()
    return (storage / "r-dense" / "journal.jsonl").read_bytes()


def test_figures_bear_the_plain_names_at_the_models_own_bits() -> None:
    widths = {
        8: {"size_bytes": 5.0, "generate_tokens_per_s": 2.0},
        4: {"size_bytes": 3.0, "generate_tokens_per_s": 1.0},
    }
    assert figures(widths, 8) == {
        "size_bytes": 5.0,
        "generate_tokens_per_s": 2.0,
        "size_8bit_bytes": 5.0,
        "generate_8bit_tokens_per_s": 2.0,
        "size_4bit_bytes": 3.0,
        "generate_4bit_tokens_per_s": 1.0,
    }
