"""The bench of servers: what it computes from answers, what it counts as an error, and a whole small one."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import finhpc
from finhpc.bench.measures.load.bench import bench_serve
from finhpc.bench.measures.load.inputs import made_tokenizer, requests_of
from finhpc.bench.measures.load.levels import Load, Sample, percentiles, row_of, run
from finhpc.bench.measures.load.servers import Server
from finhpc.bench.measures.load.soak import by_minute
from finhpc.bench.settings import ServeBench
from finhpc.errors import ConfigError
from finhpc.settings.base import build


def settings(tmp_path: Path, **more: Any) -> ServeBench:
    tree: dict[str, Any] = {
        "preset": "llama-tiny",
        "users": [1, 2],
        "requests": 3,
        "fewest": 4,
        "prompt": 16,
        "new": 8,
        "adapters": 2,
        "adapter_rank": 2,
        "cache_bytes": 10_000_000,
        "bench": {"repeats": 1, "out": str(tmp_path)},
        "resources": {"threads": 1, "device": "cpu"},
    }
    return build(ServeBench, tree | more)


def answer(begin: float, *times: float, error: str | None = None) -> dict[str, Any]:
    return {"begin": begin, "times": list(times), "tokens": len(times), "error": error, "end": times[-1]}


def test_a_row_sums_up_what_users_saw() -> None:
    answers = [answer(10, 11, 11.5, 12), answer(10, 13, 14, error="status 500")]
    samples = [Sample(10, 100, 3, 8), Sample(11, 300, 7, 8), Sample(12, 200, 0, 8)]
    one = Load(2, answers, samples, server_cores=1.5, users_cores=0.1)
    assert (one.seconds, one.tokens_per_s) == (4, 5 / 4)
    assert (one.first, one.between) == ([1, 3], [0.5, 0.5, 1])
    other = Load(2, [answer(20, 22)], [Sample(20, 50, 8, 8)], server_cores=0.5, users_cores=0.3)
    row = row_of("finhpc", [one, other])
    assert (row["users"], row["requests"], row["errors"]) == (2, 3, 1)
    assert row["requests_per_s"] == pytest.approx((2 / 4 + 1 / 2) / 2)
    assert row["tokens_per_s"] == pytest.approx((5 / 4 + 1 / 2) / 2)
    assert (row["first_token_p50_ms"], row["first_token_p95_ms"]) == (2000, pytest.approx(2900))
    assert (row["token_p50_ms"], row["token_p99_ms"]) == (500, pytest.approx(990))
    assert (row["resident_bytes"], row["blocks_used"], row["blocks"]) == (300, 8, 8)
    assert (row["server_cores"], row["users_cores"]) == (1.0, pytest.approx(0.2))
    assert percentiles("x", []) == {"x_p50_ms": None, "x_p95_ms": None, "x_p99_ms": None}


def test_minutes_of_a_long_load() -> None:
    answers = [answer(0, 5, 59), answer(50, 61, 62), answer(1, 2)]
    samples = [Sample(0, 10, 1, 9), Sample(30, 30, 2, 9), Sample(60, 20, 4, 9), Sample(119, 25, 3, 9)]
    assert by_minute(Load(1, answers, samples, 0, 0)) == [
        {"minute": 0, "requests": 2, "tokens_per_s": 3 / 60, "resident_bytes": 30, "blocks_used": 2},
        {"minute": 1, "requests": 1, "tokens_per_s": 2 / 60, "resident_bytes": 25, "blocks_used": 4},
    ]


def test_requests_of_other_seeds_have_the_same_lengths_and_other_ids(tmp_path: Path) -> None:
    one, again, other = (requests_of(settings(tmp_path), ["x", "y"], 300, 40, seed) for seed in (1, 1, 2))
    assert one == again != other
    sizes = [[(len(each["prompt"]), each["max_tokens"], each["model"]) for each in of] for of in (one, other)]
    assert sizes[0] == sizes[1]
    assert {size for size, _, _ in sizes[0]} <= set(range(4, 17))
    assert {new for _, new, _ in sizes[0]} == set(range(2, 9))
    assert [model for _, _, model in sizes[0]] == ["x", "y"] * 20
    assert max(max(each["prompt"]) for each in one) < 300


@pytest.mark.parametrize("rows", [300, 49_152])
def test_the_made_tokenizer_reads_what_it_writes(rows: int) -> None:
    tokenizer = made_tokenizer(rows)
    assert len(tokenizer) == rows
    text = "the profit of Aktia rose by 12,3 % – net"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert (len(ids) < len(text) * 0.8) == (rows > 10_000), "few rows have few merges"


class _Odd(BaseHTTPRequestHandler):
    """Answers as the prompt says: a status, or a stream of so many tokens, perhaps without its end."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status, tokens, ends = asked["prompt"]
        events = [{"choices": [{"text": "x"}]} for _ in range(tokens)]
        events += [{"choices": [], "usage": {"completion_tokens": tokens}}]
        body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n" * ends
        allowed = self.headers["Authorization"] == "Bearer secret" and asked["stream"] and asked["ignore_eos"]
        self.send_response(status if allowed else 401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *words: Any) -> None:
        pass


@contextmanager
def odd_server() -> Iterator[Server]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Odd)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        process: Any = SimpleNamespace(pid=os.getpid())
        yield Server(process, server.server_address[1], "secret", ["base"])
    finally:
        server.shutdown()


def test_every_answer_that_is_not_whole_is_an_error() -> None:
    prompts = [[200, 3, 1], [200, 2, 1], [200, 3, 0], [503, 3, 1], [200, 3, 1]]
    requests = [{"model": "base", "prompt": prompt, "max_tokens": 3} for prompt in prompts]
    with odd_server() as server:
        load = run(server, 2, requests, 30, counts_blocks=False)
    assert len(load.answers) == 5
    assert sorted(load.errors)[0] == "2 of 3 tokens came"
    assert sorted(load.errors)[1] == "ValueError: the stream ended without [DONE]"
    assert sorted(load.errors)[2].startswith("status 503: ")
    assert len(load.errors) == 3
    assert {len(each["times"]) for each in load.answers if each["error"] is None} == {3}
    assert load.users_cores > 0
    assert load.samples[0].resident_bytes > 0


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    for more, words in (
        ({"preset": "gpt5"}, "preset=gpt5 is not a preset"),
        ({"prompt": 5000}, "exceed the context of"),
        ({"minutes": 1, "adapters": 1}, "adapters=1 is too few with minutes=1"),
        ({"vllm": "/nowhere/python"}, "vllm=/nowhere/python is no interpreter that has vLLM"),
        ({"vllm": sys.executable}, "is no interpreter that has vLLM"),
    ):
        with pytest.raises(ConfigError, match=words):
            bench_serve(settings(tmp_path, **more))


def test_a_server_is_measured_under_load(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = finhpc.bench(settings(tmp_path))
    assert [(row["way"], row["users"], row["requests"]) for row in result["rows"]] == [
        ("finhpc", 1, 4), ("finhpc", 2, 6),
    ]  # fmt: skip
    for row in result["rows"]:
        assert row["errors"] == 0
        assert row["tokens_per_s"] > row["requests_per_s"] > 0
        assert row["first_token_p99_ms"] >= row["first_token_p50_ms"] > 0
        assert row["token_p99_ms"] >= row["token_p50_ms"] > 0
        assert 0 <= row["blocks_used"] <= row["blocks"]
        assert row["resident_bytes"] > 50e6
        assert row["server_cores"] > 0
    assert set(result["ratios"]) == {"2_users_over_one_at_a_time"}
    assert (Path(result["folder"]) / "serve.png").stat().st_size > 1000
    assert json.loads((Path(result["folder"]) / "result.json").read_text())["rows"] == result["rows"]
    shown = capfd.readouterr().err
    assert "2_users_over_one_at_a_time = " in shown
    assert not any("…" in line for line in shown.splitlines()), "nothing is cut off"


@pytest.mark.slow
def test_a_long_load_with_an_adapter_that_comes_and_goes(tmp_path: Path) -> None:
    result = finhpc.bench(settings(tmp_path, minutes=1.1, visit_s=5))
    (totals,) = result["totals"]
    assert totals["errors"] == totals["blocks_left"] == 0
    assert totals["adapter_visits"] >= 8
    assert 0 < totals["blocks_most"] <= result["conditions"]["blocks"]
    assert [row["minute"] for row in result["rows"]] == [0, 1]
    assert sum(row["requests"] for row in result["rows"]) == totals["requests"] > 10
    assert (Path(result["folder"]) / "soak.png").stat().st_size > 1000
