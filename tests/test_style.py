"""The house rules that a machine can check."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["mypy"],
        ["lint-imports"],
    ],
    ids=lambda command: " ".join(command),
)
def test_tool_is_content(command: list[str]) -> None:
    tool = Path(sys.executable).parent / command[0]
    done = subprocess.run([str(tool), *command[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_cluster_holds_no_python_and_jobs_no_logic() -> None:
    assert not list((ROOT / "cluster").glob("**/*.py"))
    for job in (ROOT / "jobs").glob("*.py"):
        assert len(job.read_text().splitlines()) < 15, f"{job.name}: a job only calls its verb"


def test_no_file_of_the_core_is_long() -> None:
    long = {str(path): n for path in ROOT.glob("finhpc/**/*.py") if (n := len(path.read_text().splitlines())) > 500}
    assert not long
