"""The shell scripts of `cluster/`, as far as they go without one; `tests/orchestration/test_jobs.py` starts one."""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

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
    environment["PATH"] = f"{more.get('PATH', str(BIN))}{os.pathsep}/usr/bin{os.pathsep}/bin"
    script = more.get("SCRIPT", str(CLUSTER / "start.sh"))
    return subprocess.run([script, *words], env=environment, capture_output=True, text=True, timeout=60)


def test_a_port_in_use_is_named_with_the_variable_that_changes_it(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        done = start(STORAGE=str(tmp_path / "runs"), HOME=str(tmp_path), RAY_PORT=str(port))
    assert done.returncode == 2
    assert f"error: port {port}, for Ray, is in use" in done.stderr
    assert f"RAY_PORT={port + 1} cluster/start.sh" in done.stderr
    assert not (tmp_path / ".ray").exists(), "nothing was begun"


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
    assert "halt is no command" in wrong.stderr


def test_a_process_that_took_over_a_dead_servers_id_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".servers").mkdir()
    with subprocess.Popen(["sleep", "60"]) as other:
        (tmp_path / ".servers" / "ray.pid").write_text(f"{other.pid} 1\n")
        assert "ray does not run" in start("stop", STORAGE=str(tmp_path), HOME=str(tmp_path)).stderr
        assert other.poll() is None
        other.kill()
