"""The run folder: one process at a time, resumed only as the same run, no passwords in it."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from finhpc.errors import ConfigError, RunBusyError
from finhpc.files import redact, write_atomic
from finhpc.runs.folder import RunFolder, environment
from finhpc.settings.base import build
from finhpc.settings.pretrain import PretrainConfig

HOLD = """
import sys, time
from finhpc.runs.folder import RunFolder
with RunFolder(sys.argv[1], "one").lock():
    print("held", flush=True)
    time.sleep(600)
"""


def _config(**overrides: object) -> PretrainConfig:
    tree: dict[str, dict[str, object]] = {}
    for dotted, value in overrides.items():
        section, key = dotted.split("__")
        tree.setdefault(section, {})[key] = value
    return build(PretrainConfig, tree)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "../a", "a b", ".hidden", "-x", "mlflow.db", "mlartifacts", "é"]
)
def test_names_that_are_no_folder_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.name="):
        RunFolder(tmp_path, name)


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(RunBusyError) as refused, RunFolder(tmp_path, "one").lock():
        pass
    for part in (f"process {holder.pid}", " on ", " since ", "another run.name"):
        assert part in str(refused.value)
    with RunFolder(tmp_path, "two").lock():
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with RunFolder(tmp_path, "one").lock():
        assert f"process {os.getpid()}" in (tmp_path / "one" / ".lock").read_text()


def test_the_lock_ends_with_its_block(tmp_path: Path) -> None:
    for _ in range(2):
        with RunFolder(tmp_path, "one").lock():
            pass


def _refuse(folder: RunFolder, *begun: str) -> None:
    with suppress(ConfigError), folder.lock():
        folder.write_config(_config())
        for name in begun:
            (folder.path / name).mkdir()
        raise ConfigError("no")


def test_a_refused_command_leaves_no_folder_but_work_and_older_folders_stay(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "runs", "one")
    _refuse(folder)
    assert not (tmp_path / "runs").exists()
    _refuse(folder, "checkpoints")
    assert (folder.path / "checkpoints").is_dir(), "its work had begun"
    _refuse(RunFolder(tmp_path / "runs", "two"))
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["one"]
    shutil.rmtree(folder.path / "checkpoints")
    _refuse(folder)
    assert (folder.path / "config.yaml").is_file(), "it was there before"


def test_storage_that_cannot_be_written_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="choose a folder"), RunFolder(tmp_path / "file", "one").lock():
        pass


def test_what_places_a_run_may_change(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "one")
    with folder.lock():
        folder.check_resume(_config(), "abc")  # nothing there yet
        folder.write_config(_config(data__shards="here", parallel__micro_batches=4), "abc")
        folder.check_resume(
            _config(
                data__shards="moved/there",
                parallel__stages=2,
                parallel__replicas=2,
                parallel__micro_batches=2,
                resources__threads=8,
                run__tracking_uri="http://127.0.0.1:1",
                run__max_failures=0,
                train__steps=500,
                train__eval_every=7,
                train__checkpoint_every=7,
                train__keep_checkpoints=7,
                train__sample_tokens=7,
                train__recompute="full",
            ),
            "abc",
        )


def test_every_change_of_meaning_is_listed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "one")
    with folder.lock():
        folder.write_config(_config(optimizer__lr=1e-5), "abc")
        changed = _config(
            model__layers=3,
            method__rank=32,
            data__seq_len=128,
            optimizer__lr=3e-5,
            optimizer__name="muon",
            optimizer__schedule="wsd",
            train__seed=1,
            train__precision="bf16",
            train__steps=299,
            parallel__micro_batch_size=8,
        )
        with pytest.raises(ConfigError) as refused:
            folder.check_resume(changed, "xyz")
        text = "\n".join(refused.value.problems)
        assert len(refused.value.problems) == 11, text
        assert "method.rank was 64 in the run's config, now 32; use another run.name or restore it." in text
        assert "optimizer.lr was 1e-05 in the run's config, now 3e-05" in text
        assert "optimizer.name was adamw in the run's config, now muon; use another run.name or restore it." in text
        assert "train.steps was 300 in the run's config, now 299" in text
        assert "samples per step (micro_batch_size x micro_batches x replicas) was 4 in the run's config, now 8" in text
        assert "other data (fingerprint xyz)" in text


def test_passwords_reach_no_file(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "one")
    address = "https://me:hunter2@host:5000/x"
    with folder.lock():
        folder.write_config(_config(run__tracking_uri=address))
        argv = ["/a/b/finhpc", "pretrain", "--run.tracking_uri", address, "--hub.token", "hunter2", "--api-key=hunter2"]
        found = folder.write_environment([*argv, "--tokenizer", "gpt2", "--train.sample_tokens", "8"])
    assert " ".join(found["command"]) == (
        "finhpc pretrain --run.tracking_uri https://host:5000/x --hub.token *** --api-key=*** "
        "--tokenizer gpt2 --train.sample_tokens 8"
    )
    written = [path.read_text() for path in folder.path.iterdir()]
    assert any("https://host:5000/x" in text for text in written)
    assert not any("hunter2" in text for text in written)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("http://u:p@h/x", "http://h/x"),
        ("postgresql+psycopg2://u:p@ss@h:1/db", "postgresql+psycopg2://h:1/db"),
        ("failed: https://u:p@h/a?token=xyz&b=1 (refused)", "failed: https://h/a?token=***&b=1 (refused)"),
        ("sqlite:////a/b.db", "sqlite:////a/b.db"),
        ("write to me@example.org", "write to me@example.org"),
    ],
)
def test_redact(text: str, clean: str) -> None:
    assert redact(text) == clean


def test_environment_names_versions_and_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = environment(["finhpc"])
    assert found["packages"]["torch"].startswith("2.")
    assert len(found["git_commit"]) == 40
    assert isinstance(found["git_dirty"], bool)


def test_result_round_trip_is_whole_or_nothing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "one")
    with folder.lock():
        assert folder.result() is None
        folder.write_result({"val_loss": 0.1 + 0.2, "train_loss": math.nan, "layers": [1, 2], "null": None})
        found = folder.result()
    assert found == {"val_loss": 0.1 + 0.2, "train_loss": "nan", "layers": [1, 2], "null": None}
    (folder.path / "result.json").write_text('{"a": ')
    with pytest.raises(ConfigError, match="not valid JSON"):
        folder.result()


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_atomic(path, json.dumps({"old": 1}))
    script = "import resource, signal, sys; from pathlib import Path\n"
    script += "from finhpc.files import write_atomic\n"
    script += "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
    script += "write_atomic(Path(sys.argv[1]), 'x' * 1000)"
    failed = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True)
    assert "File too large" in failed.stderr
    assert json.loads(path.read_text()) == {"old": 1}
