"""A sweep whose processes are killed: the same command ends it, nothing is trained or told to MLflow twice."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient

from finhpc.commands import ui
from finhpc.training.journal import read
from tests.runs.nodes import free_port
from tests.runs.runs import ray_process
from tests.waiting import PATIENCE_S, wait_until

STEPS = 60
FLAGS = [
    *("--model.preset", "gpt2-tiny", "--model.layers", "2", "--model.width", "32", "--model.context", "64"),
    *("--data.seq_len", "32", "--data.eval_samples", "16", "--train.steps", str(STEPS), "--train.eval_every", "10"),
    *("--train.checkpoint_every", "10", "--run.name", "faulty", "--grid", "method.rank=[4,8,12]"),
    *("--grid", "train.seed=[0,1]", "--grid", "quantization.bits=[16,4]"),
]


@contextmanager
def command(storage: Path, shards: Path, *more: str) -> Iterator[subprocess.Popen[bytes]]:
    words = [sys.executable, "-m", "finhpc.cli", "sweep", *FLAGS, "--data.shards", str(shards)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["HOME"] = str(storage)
    with open(storage / "stderr", "ab") as log:
        process = subprocess.Popen(
            [*words, "--run.storage", str(storage), *more], stdout=log, stderr=log, env=environment
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def trials(storage: Path) -> dict[str, Any]:
    """Trial -> its journal's records."""
    return {path.parent.name: read(path)[0] for path in (storage / "faulty" / "trials").glob("*/journal.jsonl")}


def ended(storage: Path) -> list[str]:
    return sorted(path.parent.name for path in (storage / "faulty" / "trials").glob("*/trial.json"))


def wait_for(storage: Path, process: subprocess.Popen[bytes], count: int) -> None:
    """Until `count` trials have ended and one more has taken steps since this start's own Ray is up."""
    family = psutil.Process(process.pid)
    wait_until(lambda: any(p.name() == "raylet" for p in family.children(recursive=True)), process, storage / "stderr")
    since = time.time()

    def under_way(name: str, records: list[dict[str, Any]]) -> bool:
        trained = (r for r in records if r["kind"] == "train" and r["step"] > 12 and r["time"] > since)
        return name not in ended(storage) and any(trained)

    wait_until(
        lambda: len(ended(storage)) >= count and any(under_way(*trial) for trial in trials(storage).items()),
        process,
        storage / "stderr",
    )


def actor(process: subprocess.Popen[bytes]) -> psutil.Process:
    """The process of one of Tune's actors, once there is one."""
    deadline, titles = time.monotonic() + 300, set[str]()
    while time.monotonic() < deadline:
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.Error):
                title = " ".join(child.cmdline())
                titles.add(title[:60])
                if title.startswith("ray::") and ("ImplicitFunc" in title or "run_trial" in title):
                    return child
        time.sleep(0.05)
    raise AssertionError(f"no actor of Tune's among {sorted(titles)}")


@pytest.mark.slow
def test_driver_worker_and_ray_killed(run_shards: Path, tmp_path: Path) -> None:
    calm, storm = tmp_path / "calm", tmp_path / "storm"
    for folder in (calm, storm):
        folder.mkdir()
    with command(calm, run_shards) as process:
        assert process.wait(PATIENCE_S) == 0, (calm / "stderr").read_text()[-3000:]

    with command(storm, run_shards) as process:  # the driver
        wait_for(storm, process, 1)
        process.kill()
        process.wait()
    before = ended(storm)
    with command(storm, run_shards) as process:  # Ray itself
        wait_for(storm, process, len(before))
        ray_process(process, "raylet").kill()
        assert process.wait(PATIENCE_S) != 0
    with command(storm, run_shards) as process:  # a worker: Tune starts its trial again
        wait_for(storm, process, min(len(ended(storm)), 5))
        actor(process).kill()
        assert process.wait(PATIENCE_S) == 0, (storm / "stderr").read_text()[-3000:]

    one, other = (json.loads((folder / "faulty" / "result.json").read_text()) for folder in (calm, storm))
    assert [(r["trial"], r["val_loss"]) for r in other["trials"]] == [
        (r["trial"], r["val_loss"]) for r in one["trials"]
    ]
    for name, records in trials(storm).items():
        last = [record for record in records if record["kind"] == "train" and record["step"] == STEPS]
        assert len(last) == 1, f"{name} was trained to its end once"
    client = MlflowClient(other["tracking_uri"])
    (experiment,) = [found for found in client.search_experiments() if found.name == "finhpc"]
    runs = client.search_runs([experiment.experiment_id])
    names = sorted(run.info.run_name for run in runs)
    assert len(names) == len(set(names)) == 13, "12 points and their parent"
    assert all(run.info.status == "FINISHED" for run in runs)


@pytest.mark.slow
def test_a_stopped_sweep_marks_its_runs(run_shards: Path, tmp_path: Path) -> None:
    with command(tmp_path, run_shards, "--train.steps", "1500") as process:  # so long that none ends as it is stopped
        wait_for(tmp_path, process, 1)
        process.terminate()
        assert process.wait(PATIENCE_S) == 143
    assert "worker.py" not in (tmp_path / "stderr").read_text(), "Ray's own threads do not start it again"
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (experiment,) = [found for found in client.search_experiments() if found.name == "finhpc"]
    status = {run.info.run_name: run.info.status for run in client.search_runs([experiment.experiment_id])}
    assert status["faulty"] == "KILLED"
    assert "RUNNING" not in status.values()
    assert "KILLED" in {state for name, state in status.items() if name != "faulty"}


@pytest.mark.slow
def test_mlflow_away_in_the_middle(run_shards: Path, tmp_path: Path) -> None:
    """Longer than the end of a trial waits for it: the sweep sends what is left when MLflow is back."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    with (
        mlflow_server(tmp_path, port) as server,
        command(tmp_path, run_shards, "--run.tracking_uri", address) as process,
    ):
        wait_for(tmp_path, process, 1)
        before = ended(tmp_path)
        os.killpg(server.pid, signal.SIGKILL)
        wait_until(lambda: len(ended(tmp_path)) >= len(before) + 2, process, tmp_path / "stderr")
        with mlflow_server(tmp_path, port):
            assert process.wait(PATIENCE_S) == 0, (tmp_path / "stderr").read_text(errors="replace")[-3000:]
            client = MlflowClient(address)
            (experiment,) = [found for found in client.search_experiments() if found.name == "finhpc"]
            runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
            result = json.loads((tmp_path / "faulty" / "result.json").read_text())
            assert client.get_model_version_by_alias("faulty", "best").run_id == result["best"]["mlflow_run_id"]
    assert "sending to MLflow what it missed of trial" in (tmp_path / "stderr").read_text()
    assert len(runs) == 13
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    for row in result["trials"]:
        run = runs[row["trial"]]
        assert run.info.run_id == row["mlflow_run_id"]
        assert run.data.tags["mlflow.parentRunId"] == runs["faulty"].info.run_id
        assert run.data.metrics["val_loss"] == pytest.approx(row["val_loss"])


@contextmanager
def mlflow_server(folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    words = ui.server_command(f"sqlite:///{folder}/server.db", port)
    with open(folder / "server.log", "ab") as log:
        server = subprocess.Popen(words, env=ui.server_environment(), stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 300
        while True:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield server
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
