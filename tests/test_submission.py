"""What `ray job submit --working-dir .` sends, and that every command can be submitted."""

from __future__ import annotations

import runpy
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

from finhpc.commands import COMMANDS

ROOT = Path(__file__).parents[1]
NAMES = [name for name in COMMANDS if " " not in name]


def test_every_command_has_its_script() -> None:
    assert {path.stem for path in (ROOT / "jobs").glob("*.py")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_script_runs_its_command(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"jobs/{name}.py", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "jobs" / f"{name}.py"), run_name="__main__")
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: finhpc {name} ")


def test_runs_data_and_models_stay_here(tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import create_package

    project = tmp_path / "project"
    left_out = ["runs/first/model/model.safetensors", "runs/mlflow.db", ".venv/lib/x.py", ".git/objects/ab"]
    left_out += ["shards/train-00000.parquet", "low-rank/model.safetensors", "model.gguf", "tests/test_cli.py"]
    sent = ["jobs/pretrain.py", "finhpc/cli.py", "finhpc/recipes/demo.yaml", "prompts.jsonl", "pyproject.toml"]
    for name in (*left_out, *sent):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_bytes(b"\0" * 1000)
    for name in (".gitignore", ".rayignore"):
        shutil.copy(ROOT / name, project)
    package = tmp_path / "package.zip"
    create_package(str(project), package, include_gitignore=True)
    with zipfile.ZipFile(package) as file:
        names = {name for name in file.namelist() if not name.endswith("/")}
    assert names == {*sent, ".gitignore", ".rayignore"}
