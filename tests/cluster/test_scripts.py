"""The shell scripts of `cluster/`, as far as they go without one; `tests/runs/test_jobs.py` starts one."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.waiting import free_port

CLUSTER = Path(__file__).parents[2] / "cluster"
BIN = Path(sys.executable).parent
SCRIPTS = ("start.sh", "slurm.sbatch")


@pytest.mark.parametrize("name", SCRIPTS)
def test_bash_and_shellcheck_find_nothing(name: str) -> None:
    for tool in (["bash", "-n"], [str(BIN / "shellcheck"), "--shell=bash"]):
        done = subprocess.run([*tool, str(CLUSTER / name)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_sbatch_options_stand_before_the_first_command_and_parse() -> None:
    lines = (CLUSTER / "slurm.sbatch").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]
    assert options == [line.removeprefix("#SBATCH ") for line in lines[:first] if line.startswith("#SBATCH")]
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    for name in ("nodes", "ntasks-per-node", "cpus-per-task"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("job-name", "mem", "time", "output", "signal"):
        parser.add_argument(f"--{name}", required=True)
    found = parser.parse_args(options)
    assert found.ntasks_per_node == 1, "a Ray node a machine"
    assert found.signal.startswith("B:TERM@"), "the script is told before the time is up"


def start(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | more
    environment.pop("SCRIPT", None)
    environment["PATH"] = f"{more.get('PATH', str(BIN))}{os.pathsep}/usr/bin{os.pathsep}/bin"
    script = more.get("SCRIPT", str(CLUSTER / "start.sh"))
    return subprocess.run([script, *words], env=environment, capture_output=True, text=True, timeout=300)


def test_a_port_in_use_is_named_with_the_variable_that_changes_it(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        done = start(STORAGE=str(tmp_path / "runs"), HOME=str(tmp_path), RAY_PORT=str(port))
    assert done.returncode == 2
    assert f"error: port {port}, for Ray, is in use" in done.stderr
    advice = re.search(rf"RAY_PORT=(\d+) {re.escape(str(CLUSTER))}/start\.sh", done.stderr)
    assert advice is not None, "a command that can be pasted from any folder"
    assert int(advice[1]) > port
    assert f"process {os.getpid()} (" in done.stderr, "who holds the port"
    assert not (tmp_path / ".ray").exists(), "nothing was begun"


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    """Servers in place of Ray and MLflow, to see what starts and what is left: each sleeps under its own name."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (tmp_path / "cluster").mkdir()
    shutil.copy(CLUSTER / "start.sh", tmp_path / "cluster")
    (folder / "ray").write_text(
        '#!/bin/sh\n[ "$1" = start ] || exit 0\necho "$@" >"$STORAGE/ray.started"\nexec sleep 60\n'
    )
    (folder / "mlflow").write_text("#!/bin/sh\nexit 3\n")
    for file in folder.iterdir():
        file.chmod(0o755)
    return folder


def start_fake(fake: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """`start` with the servers of `fake`, on free ports."""
    places = {"STORAGE": str(fake.parent / "my runs"), "HOME": str(fake.parent), "RAY_AUTH_TOKEN": "x"}
    ports = {f"{name}_PORT": str(free_port()) for name in ("RAY", "DASHBOARD", "CLIENT", "MLFLOW")}
    script = str(fake.parent / "cluster" / "start.sh")
    return start(**places | ports | {"PATH": str(fake), "SCRIPT": script} | more)


def left_running(storage: Path) -> bool:
    """Whether a process that was started with this storage is still there."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"STORAGE={storage}".encode() in path.read_bytes().split(b"\0"):
                return True
    return False


def test_a_taken_port_of_mlflow_is_noticed_before_ray_starts(fake: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        done = start_fake(fake, MLFLOW_PORT=port)
    assert done.returncode == 2
    assert f"error: port {port}, for MLflow, is in use" in done.stderr
    assert not (fake.parent / "my runs" / "ray.started").exists(), "Ray was not started"


def test_a_start_that_fails_halfway_leaves_nothing_running(fake: Path) -> None:
    done = start_fake(fake)
    assert done.returncode == 2
    assert "mlflow ended while starting" in done.stderr
    assert "ray, which this start had begun, is stopped again" in done.stderr
    storage = fake.parent / "my runs"
    assert (storage / "ray.started").exists(), "it was begun"
    assert not left_running(storage)
    assert not list((storage / ".servers").glob("*.pid"))


def test_the_port_that_a_running_commands_own_ray_takes_is_left_to_it(fake: Path) -> None:
    with socket.socket() as agent:
        with contextlib.suppress(OSError):  # a real Ray of this machine holds it already
            agent.bind(("127.0.0.1", 52365))
            agent.listen()
        done = start_fake(fake)
    assert "in use" not in done.stderr
    words = (fake.parent / "my runs" / "ray.started").read_text().split()
    assert int(words[words.index("--dashboard-agent-listen-port") + 1]) > 52365


@pytest.mark.parametrize("word", ["--help", "-h", "help"])
def test_help_is_given(word: str) -> None:
    done = start(word)
    assert done.returncode == 0
    assert "MLFLOW_PORT" in done.stdout
    assert "set -euo" not in done.stdout


def test_a_second_word_is_refused_before_anything_happens(tmp_path: Path) -> None:
    done = start("stop", "now", STORAGE=str(tmp_path / "runs"), HOME=str(tmp_path))
    assert done.returncode == 2
    assert "stop now" in done.stderr


def test_where_ray_is_not_installed_it_says_how_to(tmp_path: Path) -> None:
    (tmp_path / "cluster").mkdir()
    shutil.copy(CLUSTER / "start.sh", tmp_path / "cluster")
    script = str(tmp_path / "cluster" / "start.sh")
    done = start(STORAGE=str(tmp_path / "runs"), HOME=str(tmp_path), SCRIPT=script, PATH=str(tmp_path))
    assert done.returncode == 2
    assert "ray is not installed here" in done.stderr
    assert "make setup" in done.stderr


def test_stop_and_status_where_nothing_runs(tmp_path: Path) -> None:
    stopped = start("stop", STORAGE=str(tmp_path), HOME=str(tmp_path))
    assert stopped.returncode == 0
    assert "ray does not run" in stopped.stderr
    assert start("status", STORAGE=str(tmp_path), HOME=str(tmp_path)).returncode == 1
    wrong = start("halt", STORAGE=str(tmp_path), HOME=str(tmp_path))
    assert wrong.returncode == 2
    assert "halt is not a command" in wrong.stderr


def test_a_process_that_took_over_a_dead_servers_id_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".servers").mkdir()
    with subprocess.Popen(["sleep", "60"]) as other:
        (tmp_path / ".servers" / "ray.pid").write_text(f"{other.pid} 1\n")
        assert "ray does not run" in start("stop", STORAGE=str(tmp_path), HOME=str(tmp_path)).stderr
        assert other.poll() is None
        other.kill()


FAKES = {
    "scontrol": "echo n1; echo n2",
    "srun": 'echo "$SRUN_CPUS_PER_TASK $*" >>"$STORAGE/srun.words"',
    "ray": '[ -e "$STORAGE/mlflow.words" ] && sed "s/.*/ node_/" "$STORAGE/srun.words"',
    "mlflow": 'echo "$*" >"$STORAGE/mlflow.words"',
    "finhpc": 'echo "$*"',
}


@pytest.mark.parametrize("nodes", [1, 2])
def test_slurm_gives_rays_nodes_their_cpus_and_all_nodes_mlflows_address(tmp_path: Path, nodes: int) -> None:
    for name, body in FAKES.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"JOB_ID": "7", "CPUS_PER_TASK": "16", "JOB_NUM_NODES": str(nodes), "JOB_NODELIST": "n[1-2]"}
    environment = {f"SLURM_{name}": value for name, value in slurm.items()}
    environment |= {"PATH": f"{tmp_path}:/usr/bin:/bin", "STORAGE": str(tmp_path), "FINHPC_BIN": str(tmp_path)}
    words = ["bash", str(CLUSTER / "slurm.sbatch"), "pretrain", "--train.steps", "3"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    started = (tmp_path / "srun.words").read_text().splitlines()
    assert len(started) == nodes
    for line in started:
        assert line.startswith("16 ")
        assert "--cpus-per-task=16" in line
        assert "--num-cpus=16" in line
    uri = done.stdout.split("--run.tracking_uri ")[1].split()[0]
    host = uri.removeprefix("http://").partition(":")[0]
    assert f"--host {host} " in (tmp_path / "mlflow.words").read_text()
    assert (host == "127.0.0.1") == (nodes == 1), "an address that the other nodes reach"
