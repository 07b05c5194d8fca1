"""MLflow gets every step once, whatever dies on the way; training never waits for it."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from finhpc.commands import ui
from finhpc.errors import ConfigError
from finhpc.log import redirected
from finhpc.settings.base import build
from finhpc.settings.report import UiConfig
from finhpc.settings.training import absolute_tracking_uri, default_tracking_uri
from finhpc.tracking import mirror
from finhpc.tracking import tracker as tracking
from finhpc.tracking.describe import Description
from finhpc.tracking.store import artifact_location
from finhpc.tracking.tags import PREFIX
from finhpc.tracking.tracker import Tracker
from finhpc.training.journal import Journal

LOSSES = {step: math.sin(step) / 3 + 5.0 for step in range(1, 2001)}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "POLL_S", 0.1)
    monkeypatch.setattr(tracking, "LONGEST_RETRY_S", 0.5)
    monkeypatch.setattr(mirror, "LEAD_WAIT_S", 0.0)


@pytest.fixture
def storage(tmp_path: Path, empty_database: Path) -> Path:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return tmp_path


def _tracker(storage: Path, uri: str | None = None, name: str = "one", **more: Any) -> Tracker:
    (storage / name).mkdir(exist_ok=True)
    settings = {"experiment": "tests", "run_name": name, "params": {"a": 1}, "tags": {}, **more}
    return Tracker(Description(storage / name, uri or default_tracking_uri(storage), **settings)).start()


@pytest.fixture
def said() -> Iterator[list[str]]:
    """The lines for the user."""
    lines: list[str] = []
    with redirected(lines.append):
        yield lines


def _write_steps(folder: Path, steps: range) -> None:
    folder.mkdir(exist_ok=True)
    journal = Journal(folder / "journal.jsonl")
    for step in steps:
        journal.write("train", step=step, tokens=step * 100, train_loss=LOSSES[step], lr=None)
    journal.close()


def _history(client: MlflowClient, run_id: str, key: str) -> list[tuple[int, float]]:
    return sorted((m.step, m.value) for m in client.get_metric_history(run_id, key))


def _client(storage: Path) -> MlflowClient:
    return MlflowClient(default_tracking_uri(storage))


def _runs(client: MlflowClient) -> list[Any]:
    return list(client.search_runs([e.experiment_id for e in client.search_experiments()]))


def _until(condition: Callable[[], Any], seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_run_from_start_to_end(storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = storage / "one"
    folder.mkdir()
    (folder / "config.yaml").write_text("model: {}\n")
    tracker = _tracker(
        storage,
        params={**{f"p{i}": i for i in range(250)}, "long": "x" * 9000, "empty": "", "none": None},
        tags={"mlflow.source.git.commit": "abc"},
    )
    journal = Journal(folder / "journal.jsonl")
    journal.write("start", step=0, attempt=1, stages=2)
    journal.write("train", step=1, tokens=512, train_loss=0.1 + 0.2, grad_norm=math.inf, lr=None, warm=True)
    journal.write("train", step=2, tokens=1024, train_loss=math.nan)
    journal.write("eval", step=2, tokens=1024, val_loss=5.5)
    journal.write("memory", step=2, peak_memory_bytes=[10, 20])
    journal.write("checkpoint", step=2, path="checkpoints/2")
    journal.write("message", text="nothing for MLflow")
    result = {
        "steps": 2,
        "val_loss": 5.5,
        "params_total": 77,
        "peak_memory_bytes": [10, 20],
        "wall_s": 1.5,
        "none": None,
    }
    assert tracker.finish("FINISHED", result)

    client = _client(storage)
    run = client.get_run(tracker.run_id or "")
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "one"
    assert len(run.data.params) == 253
    assert run.data.params["long"] == "x" * 6000
    assert run.data.tags["mlflow.source.git.commit"] == "abc"
    assert run.data.tags[PREFIX + "start.stages"] == "2"
    assert run.data.tags["finhpc.not_finite"] == "train_loss at step 2: nan"
    assert _history(client, run.info.run_id, "train_loss") == [(1, 0.1 + 0.2)]
    assert _history(client, run.info.run_id, "tokens") == [(1, 512), (2, 1024)]
    assert _history(client, run.info.run_id, "val_loss") == [(2, 5.5)]
    assert _history(client, run.info.run_id, "params_total") == [(2, 77)]
    assert set(run.data.metrics) == {
        *("train_loss", "tokens", "val_loss", "params_total", "wall_s", "steps"),
        *("peak_memory_bytes_worker0", "peak_memory_bytes_worker1"),
    }
    assert {f.path for f in client.list_artifacts(run.info.run_id)} == {"config.yaml", "result.json"}
    artifacts = storage / "mlartifacts" / run.info.run_id / "artifacts"
    assert json.loads((artifacts / "result.json").read_text()) == result
    assert capsys.readouterr().out == ""  # stdout belongs to results


def test_a_resumed_run_goes_on_in_the_same_mlflow_run(storage: Path) -> None:
    _write_steps(storage / "one", range(1, 8))
    first = _tracker(storage, params={"train.steps": 7, "same": 1})
    assert first.finish("FAILED", {"steps": 7})
    _write_steps(storage / "one", range(5, 11))  # steps 5 to 7 once more
    second = _tracker(storage, params={"train.steps": 10, "same": 1, "new": 2})
    assert second.finish("FINISHED", {"steps": 10})

    client = _client(storage)
    assert second.run_id == first.run_id
    assert len(_runs(client)) == 1
    run = client.get_run(first.run_id or "")
    assert run.info.status == "FINISHED"
    assert run.data.params == {"train.steps": "7", "same": "1", "new": "2"}
    assert run.data.tags["now.train.steps"] == "10"
    assert "now.same" not in run.data.tags
    assert _history(client, run.info.run_id, "train_loss") == [(s, LOSSES[s]) for s in range(1, 11)]


def test_finishing_again_changes_nothing(storage: Path) -> None:
    _write_steps(storage / "one", range(1, 4))
    first = _tracker(storage)
    assert first.finish("FINISHED", {"steps": 3, "wall_s": 1.0})
    before = _client(storage).get_run(first.run_id or "").to_dictionary()
    assert _tracker(storage).finish("FINISHED", {"steps": 3, "wall_s": 2.0})
    assert _client(storage).get_run(first.run_id or "").to_dictionary() == before


def test_the_list_of_runs_shows_the_figures_of_the_result(storage: Path) -> None:
    (storage / "one").mkdir()
    journal = Journal(storage / "one" / "journal.jsonl")
    for step, pace in ((1, 90.0), (2, 120.0), (3, 50.0)):
        # The worker's clock is an hour ahead of the driver's.
        journal.write("train", step=step, time=time.time() + 3600, train_loss=LOSSES[step], tokens_per_s=pace)
    first = _tracker(storage)
    assert first.finish("FAILED", {"steps": 3, "train_loss": LOSSES[3], "tokens_per_s": 90.0, "wall_s": None})

    client, run_id = _client(storage), first.run_id or ""
    assert client.get_run(run_id).data.metrics == {"steps": 3, "train_loss": LOSSES[3], "tokens_per_s": 90.0}
    assert _history(client, run_id, "tokens_per_s") == [(1, 90.0), (2, 120.0), (3, 50.0), (3, 90.0)]
    assert _history(client, run_id, "train_loss") == [(s, LOSSES[s]) for s in range(1, 4)]

    journal.write("train", step=4, train_loss=LOSSES[4], tokens_per_s=60.0)
    journal.close()
    result = {"steps": 4, "train_loss": LOSSES[4], "tokens_per_s": 60.0}
    for status in ("KILLED", "FINISHED"):  # told twice, sent once
        assert _tracker(storage).finish(status, result)
        assert client.get_run(run_id).data.metrics == result
    assert _history(client, run_id, "tokens_per_s")[4:] == [(4, 60.0)]
    assert _history(client, run_id, "steps") == [(3, 3), (4, 4)]


def test_a_run_that_goes_on_is_running(storage: Path) -> None:
    _write_steps(storage / "one", range(1, 4))
    assert _tracker(storage).finish("FINISHED", {"steps": 3})
    _write_steps(storage / "one", range(4, 6))
    again = _tracker(storage)
    _until(lambda: _client(storage).get_run(again.run_id or "").info.status == "RUNNING")
    assert again.finish("FINISHED", {"steps": 5})


KILLED = """
import os, signal, sys
from pathlib import Path
from finhpc.settings.training import default_tracking_uri
from finhpc.tracking import mirror, tracker as tracking
from finhpc.tracking.describe import Description
tracking.POLL_S, mirror.RECORDS_PER_BATCH = 0.1, 100
storage, fatal = Path(sys.argv[1]), int(sys.argv[2])
saves, save = 0, mirror.State.save
def deadly(state):
    global saves
    saves += 1
    if saves == fatal:
        os.kill(os.getpid(), signal.SIGKILL)
    save(state)
mirror.State.save = deadly
uri = default_tracking_uri(storage)
tracker = tracking.Tracker(Description(storage / "one", uri, "tests", "one", {"a": 1}, {})).start()
print(tracker.finish("FINISHED", {"steps": 2000}))
"""


# The first save is of the tag by which the run is found; before the second the run was made but not
# written down; before the sixth a fourth batch was sent but not written down.
@pytest.mark.parametrize("fatal_save", [2, 6])
def test_a_killed_driver_sends_each_step_once(storage: Path, fatal_save: int) -> None:
    _write_steps(storage / "one", range(1, 1201))
    killed = subprocess.run([sys.executable, "-c", KILLED, storage, str(fatal_save)])
    assert killed.returncode == -signal.SIGKILL
    client = _client(storage)
    ((run_id, status),) = [(run.info.run_id, run.info.status) for run in _runs(client)]
    assert status == "RUNNING"
    assert len(_history(client, run_id, "train_loss")) == (0 if fatal_save == 2 else 400)

    _write_steps(storage / "one", range(1001, 2001))
    resumed = _tracker(storage)
    assert resumed.finish("FINISHED", {"steps": 2000})
    assert resumed.run_id == run_id
    assert len(_runs(client)) == 1
    assert _history(client, run_id, "train_loss") == list(LOSSES.items())


def test_two_runs_make_one_database_and_experiment_at_the_same_time(tmp_path: Path) -> None:
    drivers = []
    for name in ("one", "two"):
        _write_steps(tmp_path / name, range(1, 6))
        script = KILLED.replace('/ "one"', f'/ "{name}"')
        drivers.append(subprocess.Popen([sys.executable, "-c", script, tmp_path, "-1"], stdout=subprocess.PIPE))
    assert [driver.communicate()[0] for driver in drivers] == [b"True\n", b"True\n"]
    client = _client(tmp_path)
    assert sorted(e.name for e in client.search_experiments()) == ["Default", "tests"]
    runs = _runs(client)
    assert len(runs) == 2
    for run in runs:
        assert len(_history(client, run.info.run_id, "train_loss")) == 5


def test_another_server_gets_the_whole_story_and_the_first_is_found_again(storage: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(storage / "mlflow.db", other / "mlflow.db")
    _write_steps(storage / "one", range(1, 6))
    first = _tracker(storage)
    assert first.finish("FAILED", {})
    _write_steps(storage / "one", range(6, 9))
    second = _tracker(storage, default_tracking_uri(other))
    assert second.finish("FAILED", {})
    assert _history(_client(other), second.run_id or "", "train_loss") == [(s, LOSSES[s]) for s in range(1, 9)]
    third = _tracker(storage)
    assert third.finish("FAILED", {})
    assert third.run_id == first.run_id
    assert _history(_client(storage), first.run_id or "", "train_loss") == [(s, LOSSES[s]) for s in range(1, 9)]


def test_a_run_deleted_in_mlflow_is_made_anew(storage: Path) -> None:
    _write_steps(storage / "one", range(1, 6))
    first = _tracker(storage)
    assert first.finish("FAILED", {})
    _client(storage).delete_run(first.run_id or "")
    second = _tracker(storage)
    assert second.finish("FAILED", {})
    assert second.run_id != first.run_id
    assert len(_history(_client(storage), second.run_id or "", "train_loss")) == 5


def test_a_copied_folder_is_another_run(storage: Path) -> None:
    _write_steps(storage / "one", range(1, 6))
    first = _tracker(storage)
    assert first.finish("FAILED", {})
    shutil.copytree(storage / "one", storage / "two")
    second = _tracker(storage, name="two")
    assert second.finish("FAILED", {})
    assert second.run_id != first.run_id


def test_system_metrics_go_the_same_way(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "SAMPLE_S", 0.05)
    for expected in (1, 4):  # a resumed run counts on
        tracker = _tracker(storage)
        _until(lambda need=expected: (storage / "one" / "driver.jsonl").read_bytes().count(b"\n") >= need + 2)
        assert tracker.finish("FAILED", {})
    key = "system/cpu_utilization_percentage"
    steps = [step for step, _ in _history(_client(storage), tracker.run_id or "", key)]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= 6


@pytest.fixture
def servers() -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for server in started:
        if server.poll() is None:
            _kill(server)


def _serve(storage: Path, port: int) -> subprocess.Popen[bytes]:
    command = ui.server_command(default_tracking_uri(storage), port)
    with open(storage / "server.log", "ab") as log:
        return subprocess.Popen(command, env=ui.server_environment(), stdout=log, stderr=log, start_new_session=True)


def _kill(server: subprocess.Popen[bytes]) -> None:
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def test_a_server_that_is_down_then_up_then_killed(
    storage: Path, servers: list[subprocess.Popen[bytes]], capsys: pytest.CaptureFixture[str], said: list[str]
) -> None:
    port = _free_port()
    uri, folder, client = f"http://127.0.0.1:{port}", storage / "one", _client(storage)
    tracker = _tracker(storage, uri, params={"empty": "", "none": None})
    _write_steps(folder, range(1, 101))
    _until(lambda: said)
    assert said[0].startswith(f"MLflow at {uri} does not accept metrics (Connection refused); training continues")
    assert _runs(client) == []

    servers.append(_serve(storage, port))
    _until(lambda: len(_runs(client)) == 1 and _history(client, tracker.run_id or "", "train_loss")[-1:] != [])
    _until(lambda: len(_history(client, tracker.run_id or "", "train_loss")) == 100)
    _until(lambda: said[1:] == [f"MLflow at {uri} is back; the metrics are being sent."])

    _kill(servers[-1])
    _write_steps(folder, range(101, 201))
    _until(lambda: len(said) == 3)
    begin = time.monotonic()
    assert not tracker.finish("FINISHED", {"steps": 200}, timeout_s=2)
    assert time.monotonic() - begin < 60
    assert "run the same command again" in said[-1]
    assert str(folder) in said[-1]

    servers.append(_serve(storage, port))
    again = _tracker(storage, uri)
    assert again.finish("FINISHED", {"steps": 200})
    assert again.run_id == tracker.run_id
    assert len(_runs(client)) == 1
    assert _history(client, again.run_id or "", "train_loss") == [(s, LOSSES[s]) for s in range(1, 201)]
    run = client.get_run(again.run_id or "")
    assert run.info.status == "FINISHED"
    assert run.data.params["empty"] == ""
    assert capsys.readouterr().out == ""


def test_a_server_that_never_answers_holds_nothing_up(
    storage: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "300")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        begin = time.monotonic()
        tracker = _tracker(storage, f"http://127.0.0.1:{silent.getsockname()[1]}")
        _write_steps(storage / "one", range(1, 101))
        assert not tracker.finish("FAILED", {"steps": 100}, timeout_s=1)
        assert time.monotonic() - begin < 100, "a request alone waits 300 s"
    assert any("did not accept everything" in line for line in said)


def test_a_server_that_stalls_gets_each_step_once(
    storage: Path, servers: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    """It answers after the client has given up: what it took before that is not taken twice."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    port = _free_port()
    servers.append(_serve(storage, port))
    tracker = _tracker(storage, f"http://127.0.0.1:{port}")
    _until(lambda: tracker.run_id)
    folder = storage / "one"
    for last in (300, 600, 900):
        os.killpg(servers[-1].pid, signal.SIGSTOP)
        _write_steps(folder, range(last - 299, last + 1))
        _until(lambda: said and "does not accept metrics" in said[-1])
        os.killpg(servers[-1].pid, signal.SIGCONT)
        _until(lambda: "is back" in said[-1])
    assert tracker.finish("FINISHED", {"steps": 900})
    assert _history(_client(storage), tracker.run_id or "", "train_loss") == [(s, LOSSES[s]) for s in range(1, 901)]


def test_a_database_that_is_locked_for_a_while_gets_each_step_once(storage: Path) -> None:
    tracker = _tracker(storage)
    _until(lambda: tracker.run_id)
    with sqlite3.connect(storage / "mlflow.db") as other:
        other.execute("BEGIN EXCLUSIVE")
        _write_steps(storage / "one", range(1, 101))
        time.sleep(3)
        other.rollback()
    assert tracker.finish("FINISHED", {"steps": 100})
    assert _history(_client(storage), tracker.run_id or "", "train_loss") == [(s, LOSSES[s]) for s in range(1, 101)]


@pytest.mark.slow
def test_a_database_that_is_locked_for_long_is_said_and_gets_each_step_once(storage: Path, said: list[str]) -> None:
    tracker = _tracker(storage)
    _until(lambda: tracker.run_id)
    with sqlite3.connect(storage / "mlflow.db") as other:
        other.execute("BEGIN EXCLUSIVE")
        _write_steps(storage / "one", range(1, 101))
        _until(lambda: said)
        other.rollback()
    assert "database is locked" in said[0]
    assert tracker.finish("FINISHED", {"steps": 100})
    assert _history(_client(storage), tracker.run_id or "", "train_loss") == [(s, LOSSES[s]) for s in range(1, 101)]


def test_a_database_deleted_under_the_run_is_made_anew_with_every_step(storage: Path, said: list[str]) -> None:
    tracker = _tracker(storage)
    _write_steps(storage / "one", range(1, 51))
    _until(lambda: tracker.run_id and len(_history(_client(storage), tracker.run_id, "train_loss")) == 50)
    first = tracker.run_id
    (storage / "mlflow.db").unlink()
    _write_steps(storage / "one", range(51, 101))
    _until(lambda: said and "is back" in said[-1])
    assert "mlflow.db was deleted or replaced" in said[0]
    assert tracker.finish("FINISHED", {"steps": 100})
    assert tracker.run_id != first
    run = _client(storage).get_run(tracker.run_id or "")
    assert run.data.params == {"a": "1"}
    assert _history(_client(storage), run.info.run_id, "train_loss") == [(s, LOSSES[s]) for s in range(1, 101)]


def test_names_with_path_separators_stay_names(storage: Path) -> None:
    (storage / "deep").mkdir()
    shutil.copy(storage / "mlflow.db", storage / "deep" / "mlflow.db")
    before = sorted(path.name for path in storage.iterdir())
    (storage / "deep" / "one").mkdir()
    name, uri = "../../a/../b", default_tracking_uri(storage / "deep")
    tracker = Tracker(Description(storage / "deep" / "one", uri, name, "one", {"p": name}, {}))
    assert tracker.start().finish("FINISHED", {"steps": 0})
    assert sorted(path.name for path in storage.iterdir()) == before, "nothing outside the storage"
    assert [e.name for e in _client(storage / "deep").search_experiments()] == [name, "Default"]


def test_passwords_reach_neither_screen_nor_disk(storage: Path, said: list[str]) -> None:
    uri = f"http://me:hunter2@127.0.0.1:{_free_port()}/?token=hunter2"
    tracker = _tracker(storage, uri, params={"run.tracking_uri": uri}, tags={"uri": uri})
    _until(lambda: said)
    assert not tracker.finish("FAILED", {"steps": 0, "tracking_uri": uri}, timeout_s=1)
    written = [path.read_text() for path in (storage / "one").iterdir()]
    assert any("127.0.0.1" in text for text in written)
    assert not [text for text in said + written if "hunter2" in text]

    other = _tracker(storage, name="two", params={"run.tracking_uri": uri}, tags={"uri": uri})
    assert other.finish("FAILED", {"steps": 0, "tracking_uri": uri})
    assert b"hunter2" not in (storage / "mlflow.db").read_bytes()
    assert not [p for p in (storage / "mlartifacts").rglob("*") if p.is_file() and b"hunter2" in p.read_bytes()]


def test_addresses() -> None:
    assert default_tracking_uri("/a/b") == "sqlite:////a/b/mlflow.db"
    assert default_tracking_uri("runs") == f"sqlite:///{Path.cwd()}/runs/mlflow.db"
    assert artifact_location("sqlite:////a/b/mlflow.db") == "/a/b/mlartifacts"
    assert artifact_location("http://host") is None
    with pytest.raises(ConfigError, match="rename the folder"):
        default_tracking_uri("/a/b?c")


def test_a_relative_database_stays_where_it_was_meant(
    storage: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write_steps(storage / "one", range(1, 4))
    monkeypatch.chdir(storage)
    tracker = Tracker(Description(storage / "one", "sqlite:///mlflow.db", "tests", "one", {}, {}))
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(elsewhere)
    assert tracker.start().finish("FINISHED", {"steps": 3})
    assert tracker.uri == default_tracking_uri(storage)
    assert len(_history(_client(storage), tracker.run_id or "", "train_loss")) == 3
    assert (storage / "mlartifacts").is_dir()
    assert list(elsewhere.iterdir()) == []

    with pytest.raises(ConfigError, match=f"{elsewhere}/sub/none.db does not exist"):
        ui.ui(build(UiConfig, {"run": {"tracking_uri": "sqlite:///sub/none.db"}}))
    for absolute in ("sqlite:////a/b.db", "http://host:5000", "https://host/x?y=1"):
        assert absolute_tracking_uri(absolute) == absolute
    (elsewhere / "a%b").mkdir()
    monkeypatch.chdir(elsewhere / "a%b")
    with pytest.raises(ConfigError, match="rename the folder"):
        absolute_tracking_uri("sqlite:///x.db")


def test_the_page_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing was tracked there yet"):
        ui.ui(build(UiConfig, {"run": {"storage": str(tmp_path)}}))
    (tmp_path / "mlflow.db").touch()
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match="choose another"):
        ui.ui(build(UiConfig, {"run": {"storage": str(tmp_path)}, "port": taken.getsockname()[1]}))
