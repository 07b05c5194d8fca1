"""A thousand requests that are wrong in every way: the right answer to each, and nothing left behind."""

from __future__ import annotations

import http.client
import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.serving.server import TOKEN, Server, config_of, folders, serving
from tests.waiting import wait_until

COUNT = 1000
GOOD = {"model": "base", "prompt": "the bank", "max_tokens": 4, "temperature": 0}
LIMITS = {"limits.max_body_bytes": 20_000, "limits.body_timeout_s": 1.0, "limits.request_timeout_s": 20.0}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("bad")
    base, adapters = folders(folder)
    with serving(config_of(base, folder / "state", adapters, **LIMITS)) as server:
        yield server


def port_of(server: Server) -> int:
    return int(server.root.rpartition(":")[2])


def send(
    server: Server, body: bytes | str, path: str = "/v1/completions", token: str | None = TOKEN, method: str = "POST"
) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port_of(server), timeout=60)
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token is not None else {})
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        text = answer.read()
        return answer.status, json.loads(text) if answer.getheader("Content-Type") == "application/json" else text
    finally:
        connection.close()


def raw(server: Server, head: str, body: bytes = b"") -> socket.socket:
    """A connection on which a request was sent as it stands."""
    connection = socket.create_connection(("127.0.0.1", port_of(server)), timeout=60)
    common = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
    connection.sendall((common + head + "\r\n\r\n").encode() + body)
    return connection


def status_of(connection: socket.socket) -> int:
    with connection:
        return int(connection.recv(1 << 16).split()[1])


def closed(server: Server, how: dict[str, Any], wait_s: float) -> int:
    """A client that leaves in the middle of its answer; 0: it has none."""
    body = json.dumps(GOOD | {"max_tokens": 100, "ignore_eos": True} | how).encode()
    connection = raw(server, f"Content-Length: {len(body)}", body)
    time.sleep(wait_s)
    connection.close()
    return 0


def incomplete(server: Server) -> int:
    """A client that announces more than it sends."""
    return status_of(raw(server, "Content-Length: 1000", b'{"model": '))


def endless(server: Server) -> int:
    """A body in parts without an announced length, beyond the limit."""
    part = b"1000\r\n" + b"x" * 4096 + b"\r\n"
    return status_of(raw(server, "Transfer-Encoding: chunked", part * 6))


def cases(draw: random.Random) -> dict[str, tuple[int, Callable[[Server], int]]]:
    """Name -> the status that is right, and what sends the request."""

    def body(tree: Any, **how: Any) -> Callable[[Server], int]:
        text = tree if isinstance(tree, bytes | str) else json.dumps(tree)
        return lambda server: send(server, text, **how)[0]

    keys = ["max_tokens", "temperature", "top_p", "n", "seed", "stop", "stream", "prompt", "logprobs"]
    odd = [{}, {"a": 1}, [{}], "x", [None], -5, 1e300, [[]], "nan"]
    key = draw.choice(keys)
    fine = {"prompt": ("x", "nan"), "stop": ("x", "nan"), "seed": (-5,)}
    wrong = draw.choice([value for value in odd if value not in fine.get(key, ())])
    cut = json.dumps(GOOD)[: draw.randint(0, 60)]
    noise = bytes(draw.choices(range(256), k=draw.randint(1, 200)))
    return {
        "cut": (400, body(cut)),
        "noise": (400, body(b"{" + noise)),
        "deep": (400, body("[" * 19_000)),
        "wrong type": (400, body(GOOD | {key: wrong})),
        "unknown key": (400, body(GOOD | {f"key{draw.random()}": 1})),
        "unknown model": (404, body(GOOD | {"model": draw.choice(["x", "base:x", "base:", "BASE", "../base"])})),
        "unknown path": (404, body(GOOD, path=draw.choice(["/", "/v1", "/v1/embeddings", "/docs", "/v1//models"]))),
        "wrong method": (405, body("", method="GET")),
        "no token": (401, body(GOOD, token=None)),
        "wrong token": (401, body(GOOD, token=draw.choice(["", "x", TOKEN[:-1], TOKEN + "x", "ü" * 5]))),
        "no token, metrics": (401, body("", token="x", path="/metrics", method="GET")),
        "large": (413, body(GOOD | {"prompt": "x" * 30_000})),
        "large, in parts": (413, endless),
        "long": (400, body(GOOD | {"prompt": "the bank rate " * 100})),
        "adapter from elsewhere": (400, body({"lora_name": "x", "lora_path": "/etc"}, path="/v1/load_lora_adapter")),
        "adapter that is not there": (404, body({"lora_name": "x"}, path="/v1/unload_lora_adapter")),
        "closed": (0, lambda server: closed(server, {}, draw.random() / 20)),
        "closed stream": (0, lambda server: closed(server, {"stream": True, "n": 2}, draw.random() / 20)),
        "good": (200, body(GOOD)),
    }


def test_a_thousand_bad_requests(server: Server) -> None:
    draw = random.Random(0)
    threads = threading.active_count()
    chosen = [(name, *case) for i in range(COUNT) for name, case in [draw.choice(list(cases(draw).items()))]]
    with ThreadPoolExecutor(16) as pool:
        slow = [pool.submit(incomplete, server) for _ in range(4)]
        found = list(pool.map(lambda case: case[2](server), chosen))
    wrong = Counter((name, right, got) for (name, right, _), got in zip(chosen, found, strict=True) if right != got)
    assert not wrong
    assert {name for name, *_ in chosen} == set(cases(draw))
    assert [each.result() for each in slow] == [408] * 4
    server.wait_until_idle()
    assert send(server, json.dumps(GOOD))[0] == 200
    gauge = server.metrics.registry.get_sample_value
    wait_until(lambda: gauge("finhpc_requests_in_flight") == 0)
    assert threading.active_count() <= threads + 40, "threads of the pool that reads files, no more"


def test_errors_have_openais_form(server: Server) -> None:
    status, answer = send(server, json.dumps(GOOD | {"max_tokens": "5"}))
    assert status == 400
    error = answer["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", "max_tokens", "invalid_value")
    assert error["message"] == "max_tokens must be a whole number; correct it."
    for how in ({"token": "x"}, {"path": "/nowhere"}):
        assert set(send(server, "{}", **how)[1]["error"]) == {"message", "type", "param", "code"}
    assert send(server, "", path="/health", token=None, method="GET") == (200, b"alive")
    assert send(server, "", path="/ready", token=None, method="GET") == (200, b"ready")


def test_a_full_queue_is_an_answer_and_ends(tmp_path: Path) -> None:
    base, _ = folders(tmp_path)
    config = config_of(base, tmp_path / "state", {}, **{"limits.max_running": 1, "limits.max_queue": 2})
    long = json.dumps(GOOD | {"max_tokens": 100, "ignore_eos": True})
    with serving(config) as server, ThreadPoolExecutor(12) as pool:
        statuses = [status for status, _ in pool.map(lambda _: send(server, long), range(12))]
        assert set(statuses) == {200, 429}
        assert statuses.count(200) >= 3
        connection = http.client.HTTPConnection("127.0.0.1", port_of(server), timeout=60)
        many = json.dumps(GOOD | {"prompt": ["a"] * 4})
        connection.request("POST", "/v1/completions", many, {"Authorization": f"Bearer {TOKEN}"})
        answer = connection.getresponse()
        assert (answer.status, answer.getheader("Retry-After")) == (429, "1")
        assert json.loads(answer.read())["error"]["code"] == "queue_full"
        server.wait_until_idle()
        assert send(server, json.dumps(GOOD))[0] == 200


def test_an_answer_that_takes_too_long_ends(tmp_path: Path) -> None:
    base, _ = folders(tmp_path)
    with serving(config_of(base, tmp_path / "state", {}, **{"limits.request_timeout_s": 0.005})) as server:
        long = GOOD | {"max_tokens": 100, "ignore_eos": True}
        status, answer = send(server, json.dumps(long))
        assert (status, answer["error"]["code"]) == (504, "timeout")
        status, events = send(server, json.dumps(long | {"stream": True}))
        last = events.strip().split(b"\n\n")[-1]
        assert status == 200
        assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "timeout"
        server.wait_until_idle()


def test_a_server_that_drains_finishes_what_it_has(tmp_path: Path) -> None:
    base, adapters = folders(tmp_path)
    with serving(config_of(base, tmp_path / "state", adapters)) as server, ThreadPoolExecutor(8) as pool:
        long = json.dumps(GOOD | {"max_tokens": 110, "ignore_eos": True, "model": "base:a1", "n": 4})
        running = [pool.submit(send, server, long) for _ in range(8)]
        wait_until(lambda: server.served.engine.in_work == 32)
        server.served.shared.drain()
        status, answer = send(server, json.dumps(GOOD))
        assert (status, answer["error"]["code"]) == (503, "draining")
        assert send(server, "", path="/ready", method="GET")[0] == 503
        assert send(server, "", path="/health", method="GET")[0] == 200
        for each in running:
            status, answer = each.result()
            assert status == 200
            assert answer["usage"]["completion_tokens"] == 440


def test_a_model_that_breaks_ends_all_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error inside a pass: every request gets an answer, and the server says that it is not well."""
    base, _ = folders(tmp_path)
    with serving(config_of(base, tmp_path / "state", {})) as server:
        batcher = server.served.engine.batcher
        step, passes = batcher.step, iter(range(3))

        def broken() -> Any:
            if next(passes, None) is None:
                raise RuntimeError("out of memory, and the bank is a part of a prompt")
            return step()

        monkeypatch.setattr(batcher, "step", broken)
        status, answer = send(server, json.dumps(GOOD | {"max_tokens": 50, "ignore_eos": True}))
        assert (status, answer["error"]["code"]) == (503, "unavailable")
        assert send(server, json.dumps(GOOD))[0] == 503
        assert send(server, "", path="/health", method="GET")[0] == 503
