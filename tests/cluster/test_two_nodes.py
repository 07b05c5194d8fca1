"""A pipeline over two nodes: one stage on each, the loss of one, its return."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finhpc.training.journal import read
from tests.runs.nodes import two_nodes
from tests.runs.runs import CUT, FLAGS, STEPS, assert_same_run, last_words, outcome, wait_for_step
from tests.tiny import tiny_shards
from tests.waiting import PATIENCE_S, wait_until


@pytest.mark.slow
def test_a_pipeline_over_two_nodes_survives_the_loss_of_one(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    storage, shards = tmp_path / "storage", tiny_shards(tmp_path / "shards")
    (storage / "run").mkdir(parents=True)
    (storage / "run" / "stages.json").write_text(json.dumps(CUT))
    words = [sys.executable, "-m", "finhpc.cli", "pretrain", *FLAGS, "--data.shards", str(shards)]
    words += ["--run.storage", str(storage), "--run.name", "run"]
    with two_nodes(tmp_path / "cluster") as nodes, open(storage / "stderr", "ab") as log:
        environment = nodes.environment | {"RAY_ADDRESS": f"{nodes.head.address}:{nodes.port}"}
        driver = subprocess.Popen([*nodes.head.inside, *words], env=environment, stdout=log, stderr=log)
        try:
            wait_for_step(storage, 20, driver)
            assert [len(node.train_workers()) for node in (nodes.head, nodes.worker)] == [1, 1], "a stage on each node"
            lost = time.monotonic()
            nodes.lose(nodes.worker)
            wanted = "the workers wait for resources: they need 2 CPU, the cluster has 1"
            wait_until(lambda: wanted in last_words(storage), driver, storage / "stderr")
            said = time.monotonic() - lost
            time.sleep(float(os.environ.get("FINHPC_NODE_AWAY_S", "5")))
            assert driver.poll() is None, last_words(storage)
            nodes.start(nodes.worker)
            back = time.monotonic()
            before = len(starts(storage))
            wait_until(lambda: len(starts(storage)) > before, driver, storage / "stderr")
            resumed = time.monotonic() - back
            assert driver.wait(PATIENCE_S) == 0, last_words(storage)
        finally:
            driver.kill()
            driver.wait()
    print(f"networks of their own: {nodes.separate}; said after {said:.1f} s, trained {resumed:.1f} s after return")
    assert "the workers have their resources again" in (storage / "stderr").read_text()
    assert len(starts(storage)) == 2
    assert starts(storage)[1] > 0, "it goes on from a checkpoint"
    assert_same_run(outcome(storage), request.getfixturevalue("unbroken"))
    assert outcome(storage)["train"].keys() == set(range(1, STEPS + 1))


@pytest.mark.slow
def test_a_sweep_of_pipelines_over_two_nodes_survives_the_loss_of_one(tmp_path: Path) -> None:
    storage, shards = tmp_path / "storage", tiny_shards(tmp_path / "shards")
    storage.mkdir()
    trials = storage / "run" / "trials"
    words = [sys.executable, "-m", "finhpc.cli", "sweep", *FLAGS, "--data.shards", str(shards)]
    words += ["--run.storage", str(storage), "--run.name", "run", "--grid", "optimizer.lr=[0.001,0.002]"]
    with two_nodes(tmp_path / "cluster") as nodes, open(storage / "stderr", "ab") as log:
        environment = nodes.environment | {"RAY_ADDRESS": f"{nodes.head.address}:{nodes.port}"}
        driver = subprocess.Popen([*nodes.head.inside, *words], env=environment, stdout=log, stderr=log)
        try:
            begun = [trials / name for name in ("lr0.001", "lr0.002")]
            wait_until(lambda: any(last_step(run) >= 20 for run in begun), driver, storage / "stderr")
            first = max(begun, key=last_step)
            assert [len(node.train_workers()) for node in (nodes.head, nodes.worker)] == [1, 1], "a stage on each node"
            nodes.lose(nodes.worker)
            time.sleep(5)
            assert driver.poll() is None, last_words(storage)
            nodes.start(nodes.worker)
            assert driver.wait(PATIENCE_S) == 0, last_words(storage)
        finally:
            driver.kill()
            driver.wait()
    result = json.loads((storage / "run" / "result.json").read_text())
    assert [(row["status"], row["steps"]) for row in result["trials"]] == [("finished", STEPS)] * 2
    assert len(starts(trials, first.name)) == 2
    assert starts(trials, first.name)[1] > 0, "it goes on from a checkpoint"
    (other,) = set(begun) - {first}
    assert starts(trials, other.name) == [0]


def last_step(run: Path) -> int:
    records, _ = read(run / "journal.jsonl")
    return max((record["step"] for record in records if record["kind"] == "train"), default=0)


def starts(storage: Path, name: str = "run") -> list[int]:
    records, _ = read(storage / name / "journal.jsonl")
    return [record["step"] for record in records if record["kind"] == "start"]
