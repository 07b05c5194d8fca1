"""`ray job submit` on a cluster with token authentication: packaging, status, exit code, refusal."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.tiny import tiny_shards

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).parent / "ray")


@dataclass(frozen=True)
class Cluster:
    address: str
    environment: dict[str, str]
    storage: Path

    def submit(self, *words: str, token: bool = True) -> subprocess.CompletedProcess[str]:
        """`ray job submit` of a clean copy of the project, waiting for the end and showing the logs."""
        environment = dict(self.environment)
        if not token:
            environment["HOME"] = str(self.storage)
        command = [RAY, "job", "submit", "--address", self.address, "--working-dir", str(self.storage / "project")]
        return subprocess.run(
            [*command, "--", sys.executable, *words], env=environment, capture_output=True, text=True, timeout=300
        )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    storage = tmp_path_factory.mktemp("cluster")
    tiny_shards(storage / "shards")
    (storage / "project").mkdir()
    shutil.copytree(ROOT / "jobs", storage / "project" / "jobs")
    home = storage / "home"
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(home), "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
    subprocess.run([RAY, "get-auth-token", "--generate"], env=environment, check=True, capture_output=True)
    port, dashboard = free_port(), free_port()
    start = [RAY, "start", "--head", "--port", str(port), "--dashboard-port", str(dashboard), "--num-cpus", "4"]
    start += ["--dashboard-host", "127.0.0.1", "--node-ip-address", "127.0.0.1", "--temp-dir", f"/tmp/ray-{port}"]
    # A port of its own: the agent that runs jobs cannot share the default one with another Ray of the machine.
    start += ["--dashboard-agent-listen-port", str(free_port()), "--block"]
    with open(storage / "ray.log", "wb") as log:
        head = subprocess.Popen(start, env=environment, stdout=log, stderr=log)
    try:
        made = Cluster(f"http://127.0.0.1:{dashboard}", environment, storage)
        ready = [RAY, "job", "submit", "--address", made.address, "--no-wait", "--", "true"]
        for _ in range(40):  # the agent that runs jobs comes up some seconds after the address answers
            if subprocess.run(ready, env=environment, capture_output=True).returncode == 0:
                break
            assert head.poll() is None, (storage / "ray.log").read_text()[-2000:]
            time.sleep(0.5)
        else:
            raise AssertionError((storage / "ray.log").read_text()[-2000:])
        yield made
    finally:
        family = [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)]
        for process in family:
            with contextlib.suppress(psutil.Error):
                process.kill()
        head.wait(30)
        shutil.rmtree(f"/tmp/ray-{port}", ignore_errors=True)


def flags(cluster: Cluster, name: str) -> list[str]:
    return [
        *("--model.preset", "gpt2-tiny", "--model.layers", "2", "--model.width", "32", "--model.context", "64"),
        *("--method.rank", "8", "--data.shards", str(cluster.storage / "shards"), "--data.seq_len", "32"),
        *("--data.eval_samples", "8", "--parallel.stages", "2", "--train.steps", "10"),
        *("--run.storage", str(cluster.storage / "runs"), "--run.name", name),
    ]


def test_a_job_succeeds_with_the_token(cluster: Cluster) -> None:
    done = cluster.submit("jobs/pretrain.py", *flags(cluster, "good"), "--json")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "succeeded" in done.stdout
    result = json.loads((cluster.storage / "runs" / "good" / "result.json").read_text())
    assert result["status"] == "finished"
    assert json.dumps(result) in done.stdout, "the result is in the job's log"
    assert "step 10/10" in done.stdout
    token = Path(cluster.environment["HOME"]) / ".ray" / "auth_token"
    assert token.stat().st_mode & 0o077 == 0, "a job makes Ray's token private too"


def test_a_job_is_refused_without_the_token(cluster: Cluster) -> None:
    done = cluster.submit("jobs/pretrain.py", *flags(cluster, "refused"), token=False)
    assert done.returncode != 0
    assert not (cluster.storage / "runs" / "refused").exists()
    assert "auth" in (done.stdout + done.stderr).lower()


def test_a_failing_run_gives_a_failed_job(cluster: Cluster) -> None:
    diverge = ("--optimizer.lr", "1e30", "--optimizer.grad_clip", "0", "--optimizer.warmup_steps", "0")
    done = cluster.submit("jobs/pretrain.py", *flags(cluster, "diverges"), *diverge)
    assert done.returncode != 0
    assert "failed" in done.stdout
    assert "at step" in done.stdout, "the job's log says why"
    assert json.loads((cluster.storage / "runs" / "diverges" / "result.json").read_text())["status"] == "failed"
