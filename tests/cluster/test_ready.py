"""What keeps Ray from starting is named in seconds, before anything of Ray runs."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from finhpc.cli import main
from finhpc.cluster import ready as ray_ready
from finhpc.cluster.ready import check_ray
from finhpc.errors import ConfigError
from tests.tiny import tiny_shards
from tests.waiting import free_port


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in a process that has not started Ray, and without a setting of Ray's."""
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")


@pytest.fixture
def web_page() -> Iterator[int]:
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_port
    server.shutdown()


def test_a_healthy_machine_is_fine() -> None:
    check_ray()


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "localhost:{}"])
def test_a_dead_cluster_is_named_at_once(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    address = form.format(free_port())
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(ray_ready, "ANSWER_S", 500.0)
    begin = time.monotonic()
    with pytest.raises(ConfigError, match=f"RAY_ADDRESS={address}: no cluster answers there") as caught:
        check_ray()
    assert "unset RAY_ADDRESS to work on this machine" in str(caught.value)
    assert time.monotonic() - begin < 100


@pytest.mark.parametrize("address", ["head-node", "nowhere.invalid:6379", "127.0.0.1:99999"])
def test_an_address_that_is_none(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError, match=f"RAY_ADDRESS={address}"):
        check_ray()


def test_a_port_of_something_else(web_page: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{web_page}")
    monkeypatch.setattr(ray_ready, "ANSWER_S", 1.0)
    with pytest.raises(ConfigError, match="what answers there is not a Ray cluster"):
        check_ray()


def test_a_machine_on_which_ray_cannot_start_names_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/proc/nobody")
    monkeypatch.setenv("RAY_TMPDIR", "/proc/" + "long" * 10)
    with pytest.raises(ConfigError) as caught:
        check_ray()
    home, long, written = caught.value.problems
    assert home.startswith("HOME=/proc/nobody is not writable (")
    assert "is too long for Ray's sockets" in long
    assert "set RAY_TMPDIR to a short path" in long
    assert "cannot be written" in written
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    monkeypatch.delenv("RAY_TMPDIR")
    monkeypatch.setenv("TMPDIR", "/tmp")
    check_ray()


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ray_ready, "LOG_BYTES", 1 << 60)
    with pytest.raises(ConfigError, match=r"RAY_TMPDIR=/tmp has .* MB left, too little for Ray's logs"):
        check_ray()


def test_commands_say_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # another test of this process may have started one
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    (tmp_path / "text.txt").write_text("The bank. " * 200)
    words = ["--data.seq_len", "32", "--method.rank", "8", "--run.storage", str(tmp_path / "runs")]
    for command in (
        ["prepare", "--source", str(tmp_path / "text.txt"), "--out", str(tmp_path / "out")],
        ["pretrain", "--data.shards", str(tiny_shards(tmp_path / "shards")), *words],
    ):
        assert main(command) == 2
        assert "no cluster answers there" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "runs").exists()
