"""`ray job submit` to the servers of `cluster/start.sh`: packaging, status, exit code, stop, refusal."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.runs.nodes import RAY, ray_environment
from tests.tiny import tiny_shards
from tests.waiting import free_port, wait_until

ROOT = Path(__file__).parents[2]
LIMIT = 16 * 2**20  # of a submission, in bytes; Ray's own is 512 MiB
START = str(ROOT / "cluster" / "start.sh")


@dataclass(frozen=True)
class Cluster:
    address: str
    tracking: str
    environment: dict[str, str]
    storage: Path

    def ray(self, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
        """`ray job ...` as a user with the token calls it; `more` changes the environment."""
        command = [RAY, "job", words[0], "--address", self.address, *words[1:]]
        environment = self.environment | more
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)

    def submit(self, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
        """Submit a clean copy of the project, wait for the end and show the logs."""
        return self.ray("submit", "--working-dir", str(self.storage / "project"), "--", sys.executable, *words, **more)

    def start(self, command: str = "start") -> subprocess.CompletedProcess[str]:
        return subprocess.run([START, command], env=self.environment, capture_output=True, text=True, timeout=500)

    def servers(self) -> list[psutil.Process]:
        """Every process that came from the start script, jobs and workers included."""
        found = []
        for name in ("ray", "mlflow"):
            first = psutil.Process(int((self.storage / "runs" / ".servers" / f"{name}.pid").read_text().split()[0]))
            found += [first, *first.children(recursive=True)]
        return found


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    storage = tmp_path_factory.mktemp("cluster")
    tiny_shards(storage / "shards")
    (storage / "project").mkdir()
    shutil.copytree(ROOT / "jobs", storage / "project" / "jobs")
    (storage / "home").mkdir()
    ports = {name: str(free_port()) for name in ("RAY", "DASHBOARD", "AGENT", "CLIENT", "MLFLOW")}
    environment = ray_environment(storage / "home") | {f"{name}_PORT": port for name, port in ports.items()}
    environment |= {"STORAGE": str(storage / "runs"), "CPUS": "4", "RAY_max_grpc_message_size": str(LIMIT)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    made = Cluster(
        f"http://127.0.0.1:{ports['DASHBOARD']}", f"http://127.0.0.1:{ports['MLFLOW']}", environment, storage
    )
    try:
        started = made.start()
        assert started.returncode == 0, started.stderr
        assert "ray job submit --working-dir . -- python jobs/pretrain.py" in started.stdout
        yield made
        left = made.servers()
    finally:
        stopped = made.start("stop")
        shutil.rmtree(f"/tmp/ray-{os.getuid()}-{ports['RAY']}", ignore_errors=True)
    assert "ray is stopped" in stopped.stderr
    assert not psutil.wait_procs(left, timeout=100)[1], "nothing of it is left"


def flags(cluster: Cluster, name: str) -> list[str]:
    return [
        *("--model.preset", "gpt2-tiny", "--model.layers", "2", "--model.width", "32", "--model.context", "64"),
        *("--method.rank", "8", "--data.shards", str(cluster.storage / "shards"), "--data.seq_len", "32"),
        *("--data.eval_samples", "8", "--parallel.stages", "2", "--train.steps", "10"),
        *("--run.storage", str(cluster.storage / "runs"), "--run.tracking_uri", cluster.tracking, "--run.name", name),
    ]


def test_a_job_succeeds_with_the_token(cluster: Cluster) -> None:
    done = cluster.submit("jobs/pretrain.py", *flags(cluster, "good"), "--json")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "succeeded" in done.stdout
    result = json.loads((cluster.storage / "runs" / "good" / "result.json").read_text())
    assert result["status"] == "finished"
    assert json.dumps(result) in done.stdout, "the result is in the job's log"
    assert "step 10/10" in done.stdout
    assert mlflow_status(cluster, "good") == "FINISHED"


@pytest.mark.parametrize("token", ["", "a" * 64], ids=["without", "wrong"])
def test_a_job_is_refused_without_the_right_token(cluster: Cluster, token: str, tmp_path: Path) -> None:
    done = cluster.submit("-c", "1", HOME=str(tmp_path), RAY_AUTH_TOKEN=token)
    assert done.returncode != 0
    assert "submitted successfully" not in done.stdout
    why = "Invalid authentication token" if token else "couldn't find an authentication token"
    assert why in done.stdout + done.stderr


def test_the_servers_are_open_to_this_machine_and_user_alone(cluster: Cluster) -> None:
    listening = {
        link.laddr.ip.removeprefix("::ffff:")
        for process in cluster.servers()
        for link in process.net_connections()
        if link.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}
    for path in (Path(cluster.environment["HOME"]) / ".ray" / "auth_token", *(cluster.storage / "runs").iterdir()):
        assert path.stat().st_mode & 0o077 == 0, path


def test_starting_twice_starts_nothing_again(cluster: Cluster) -> None:
    before = {process.pid for process in cluster.servers()[:1]}
    again = cluster.start()
    assert again.returncode == 0
    assert "Ray runs already\nMLflow runs already" in again.stderr
    assert cluster.address in again.stdout
    assert {process.pid for process in cluster.servers()[:1]} == before
    assert cluster.start("status").returncode == 0


def test_a_stopped_job_frees_its_workers_and_marks_its_run(cluster: Cluster) -> None:
    words = [*flags(cluster, "stopped"), "--train.steps", "100000", "--train.checkpoint_every", "20"]
    project = str(cluster.storage / "project")
    sent = cluster.ray(
        "submit", "--no-wait", "--working-dir", project, "--", sys.executable, "jobs/pretrain.py", *words
    )
    name = re.search(r"raysubmit_\w+", sent.stdout)
    assert sent.returncode == 0, sent.stderr
    assert name is not None
    folder = cluster.storage / "runs" / "stopped"
    wait_until(lambda: list(folder.glob("checkpoints/step_*")))
    assert train_workers(cluster) == 2
    stopped = cluster.ray("stop", name[0])
    assert stopped.returncode == 0, stopped.stderr
    assert "was stopped" in cluster.ray("status", name[0]).stdout
    assert "which is saved; the same" in cluster.ray("logs", name[0]).stdout
    assert json.loads((folder / "result.json").read_text())["status"] == "killed"
    assert mlflow_status(cluster, "stopped") == "KILLED"
    wait_until(lambda: not train_workers(cluster))


def test_a_submission_above_the_limit_says_what_to_leave_out(cluster: Cluster) -> None:
    large = cluster.storage / "project" / "large.bin"
    large.write_bytes(os.urandom(LIMIT + 1))
    try:
        refused = cluster.submit("-c", "1")
        assert refused.returncode != 0
        assert re.search(r"exceeds the maximum size.*\.rayignore", refused.stdout + refused.stderr)
        shutil.copy(ROOT / ".rayignore", cluster.storage / "project")
        accepted = cluster.submit("-c", "1")
        assert accepted.returncode == 0, accepted.stderr
    finally:
        large.unlink()


@pytest.mark.slow  # a job with a mistake in its settings fails, and test_pretrain has a run that diverges
def test_a_failing_run_gives_a_failed_job(cluster: Cluster) -> None:
    diverge = ("--optimizer.lr", "1e30", "--optimizer.grad_clip", "0", "--optimizer.warmup_steps", "0")
    done = cluster.submit("jobs/pretrain.py", *flags(cluster, "diverges"), *diverge)
    assert done.returncode != 0
    assert "failed" in done.stdout
    assert "at step" in done.stdout, "the job's log says why"
    assert json.loads((cluster.storage / "runs" / "diverges" / "result.json").read_text())["status"] == "failed"
    assert mlflow_status(cluster, "diverges") == "FAILED"


def test_a_mistake_in_the_settings_is_the_jobs_exit_code(cluster: Cluster) -> None:
    done = cluster.submit("jobs/pretrain.py", *flags(cluster, "mistaken"), "--method.rnk", "8")
    assert done.returncode == 1, "Ray's own, of every job that failed"
    assert "method.rank" in done.stdout
    assert "failed with exit code 2" in done.stdout


def mlflow_status(cluster: Cluster, run: str) -> str:
    from mlflow import MlflowClient

    kept = json.loads((cluster.storage / "runs" / run / "mlflow.json").read_text())
    return str(MlflowClient(cluster.tracking).get_run(kept["run_id"]).info.status)


def train_workers(cluster: Cluster) -> int:
    return sum("TrainWorker" in " ".join(process.cmdline()) for process in cluster.servers() if process.is_running())
