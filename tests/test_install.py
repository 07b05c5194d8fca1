"""The package is whole from any folder, in any process, installed either way; else it is refused."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from finhpc.cluster import package
from finhpc.cluster.package import FOLDER, Driver, check_workers_package
from finhpc.errors import ConfigError
from tests.tiny import tiny_shards

ROOT = Path(__file__).parents[1]
FOUND_AS_A_FOLDER = """
import sys, types
sys.modules["finhpc"] = types.ModuleType("finhpc")  # as an import system gives it that found a folder alone
sys.modules["finhpc"].__path__ = [sys.argv[1]]
import finhpc.settings.base
"""


def test_a_plain_folder_is_refused() -> None:
    done = subprocess.run([sys.executable, "-c", FOUND_AS_A_FOLDER, FOLDER], capture_output=True, text=True)
    assert done.returncode != 0
    assert f"ImportError: finhpc was found as a plain folder ({FOLDER})" in done.stderr
    assert "reinstall it with `pip install --editable CLONE`" in done.stderr


def test_the_folder_around_a_clone_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "finhpc").mkdir()
    monkeypatch.chdir(tmp_path)
    check_workers_package()


def test_a_folder_with_another_copy_is_refused_before_workers_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "finhpc"
    other.mkdir()
    (other / "__init__.py").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"the folder {tmp_path} has a finhpc of its own") as caught:
        check_workers_package()
    assert "run the command from another folder, or with that copy" in str(caught.value)
    for path in FOLDER.rglob("*.py"):  # the same code, as a submitted job has it
        (other / path.relative_to(FOLDER)).parent.mkdir(parents=True, exist_ok=True)
        (other / path.relative_to(FOLDER)).write_bytes(path.read_bytes())
    monkeypatch.setattr(package, "CODE", (".py",))
    package.sha256_of.cache_clear()
    check_workers_package()
    package.sha256_of.cache_clear()


def test_a_worker_with_another_version_ends_at_once() -> None:
    here = Driver.here()
    here.enter()
    other = Driver("/elsewhere/finhpc", "0.0.9", "0" * 64, here.plugins)
    with pytest.raises(ConfigError, match=r"a worker has another finhpc \(.* than the command that started it \(0.0.9"):
        other.enter()


# -- real installations ---------------------------------------------------------------------


def environment(folder: Path, install: list[str]) -> Path:
    """The bin folder of a new environment with finhpc as pip installs it.

    There may be no network, so the libraries are those of this environment, added by a .pth file.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    libraries = sysconfig.get_path("purelib")
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    (site / "libraries.pth").write_text(libraries + "\n")
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--disable-pip-version-check", *install], check=True, cwd=folder)
    return folder / "bin"


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone called finhpc, with the working tree's files."""
    folder = tmp_path_factory.mktemp("around") / "finhpc"
    listed = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


def wheel_of(clone: Path, folder: Path) -> Path:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, clone]
    subprocess.run([str(word) for word in build], check=True, capture_output=True)
    (wheel,) = folder.glob("finhpc-*.whl")
    with zipfile.ZipFile(wheel) as file:
        files = {path.relative_to(clone).as_posix() for path in (clone / "finhpc").rglob("*") if path.is_file()}
        assert files <= set(file.namelist())
    return wheel


def demo(bin: Path, folder: Path) -> list[list[str]]:
    """The commands of `make demo`, run by `bin/finhpc` in `folder`."""
    rule = (ROOT / "Makefile").read_text().partition("\ndemo:")[2].partition("\n\n")[0]
    lines = re.findall(r"^\t(\$\(BIN\)/finhpc .*)$", rule, flags=re.MULTILINE)
    values = {"$(BIN)": str(bin), "$(DEMO)": str(folder), "$(RUN)": "demo"}
    for name, value in values.items():
        lines = [line.replace(name, value) for line in lines]
    return [shlex.split(line) for line in lines]


def test_a_stopped_demo_is_resumed_by_the_same_command(tmp_path: Path) -> None:
    prepare, pretrain = demo(tmp_path, tmp_path)
    assert not [word for word in prepare + pretrain if "$" in word], "what changes from call to call is a new run"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["editable", "wheel"])
def test_an_installed_finhpc_works_in_the_folder_around_its_clone(how: str, clone: Path, tmp_path: Path) -> None:
    """Notebook, command, Ray's workers and a sweep's trials; there packed models once opened as raw codes."""
    source = ["--editable", str(clone)] if how == "editable" else [str(wheel_of(clone, tmp_path / "dist"))]
    bin = environment(tmp_path / "venv", source)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*words: str | Path, cwd: Path = clone.parent) -> str:
        done = subprocess.run([str(word) for word in words], cwd=cwd, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    for cwd in (clone.parent, clone, tmp_path):
        where = run(bin / "python", "-c", "import finhpc; print(finhpc.__file__, finhpc.__version__)", cwd=cwd)
        inside = clone if how == "editable" or cwd == clone else tmp_path / "venv"
        assert where.startswith(str(inside)), (how, cwd, where)
    assert "pretrain" in run(bin / "finhpc", "--help")
    if how == "wheel":
        prepare, pretrain = demo(bin, tmp_path / "demo")
        run(*prepare, cwd=tmp_path)
        assert json.loads(run(*pretrain, "--json", cwd=tmp_path).splitlines()[-1])["status"] == "finished"
    assert "lr: 0.001" in run(bin / "finhpc", "pretrain", "--config", "demo", "--print_config")
    shards = tiny_shards(tmp_path / "shards")
    words = ["--data.shards", str(shards), "--data.seq_len", "32", "--data.eval_samples", "16", "--method.rank", "8"]
    words += [
        "--model.preset",
        "gpt2-tiny",
        "--model.layers",
        "2",
        "--train.steps",
        "4",
        "--run.storage",
        str(tmp_path),
    ]
    found = json.loads(run(bin / "finhpc", "sweep", *words, "--grid", "quantization.bits=[16,8,4]", "--json"))
    losses = [trial["val_loss"] for trial in found["trials"]]
    assert len(losses) == 3
    assert max(losses) - min(losses) < 0.5, losses
