"""A long constant load, during which an adapter comes and goes: nothing fails, and memory keeps within its bound."""

from __future__ import annotations

import json
import logging
import subprocess
import time
from pathlib import Path
from typing import Any

from finhpc.bench.measures.load.figure import draw_soak
from finhpc.bench.measures.load.inputs import requests_of
from finhpc.bench.measures.load.levels import Load, percentiles, run
from finhpc.bench.measures.load.servers import Server, finhpc_server
from finhpc.bench.report import Row, publish
from finhpc.bench.settings import ServeBench
from finhpc.errors import DataError
from finhpc.models.files.source import config_of
from finhpc.serving.metrics import BLOCKS, BLOCKS_USED

log = logging.getLogger(__name__)

LATE = "late"  # the adapter that comes and goes
PROMPTS = 512  # different ones
SETTLE_S = 3.0  # until the counts of the last requests are published
SHOWN = ("minute", "requests", "tokens_per_s", "resident_bytes", "blocks_used")


def soak(settings: ServeBench, model: Path, adapters: dict[str, Path], place: Path, began: float) -> dict[str, Any]:
    """Load a server with the first of `users` for `minutes`, and publish; `rows`: what every minute showed.

    Raises `DataError` after that if a request failed, the cache left its bound, or blocks are still in use at the end.
    """
    assert settings.minutes is not None
    users, seconds = settings.users[0], settings.minutes * 60
    *kept, late = adapters.items()
    words = ["--dtype", "bfloat16" if settings.precision == "bf16" else "float32"]
    words += ["--cache.bytes", str(settings.cache_bytes), "--limits.max_running", str(users + 1)]
    words += ["--limits.max_adapter_rank", str(settings.adapter_rank), "--adapter_root", str(place)]
    with finhpc_server(str(model), dict(kept), words, settings.resources.threads, place / "finhpc.log") as server:
        rows = config_of(model).vocab_size
        requests = requests_of(settings, server.models, rows, PROMPTS, 0)
        visits = _Visits(settings, server, late[1], rows)
        load = run(server, users, requests, seconds, True, repeat=True, meanwhile=visits)
        time.sleep(SETTLE_S)
        left, blocks = server.gauges(BLOCKS_USED, BLOCKS)
        served = server.process.poll() is None
    minutes = by_minute(load)
    conditions = {
        "model": settings.model or f"{settings.preset}, random weights",
        "precision": settings.precision,
        "threads": settings.resources.threads,
        "users": users,
        "cache_bytes": settings.cache_bytes,
        "blocks": blocks,
    }
    totals = {
        "requests": len(load.answers),
        "errors": len(load.errors),
        "tokens_per_s": load.tokens_per_s,
        "adapter_visits": visits.count,
        "resident_growth_bytes": minutes[-1]["resident_bytes"] - minutes[len(minutes) // 4]["resident_bytes"],
        "blocks_most": max(row["blocks_used"] for row in minutes),
        "blocks_left": left,
    }
    latency = percentiles("first_token", load.first) | percentiles("token", load.between)
    problems = [*visits.errors, *load.errors]
    problems += [f"{totals['blocks_most']} of {blocks} blocks were in use"] * (totals["blocks_most"] > blocks)
    problems += [f"{left} blocks are in use without a request"] * (left > 0)
    problems += ["the server has ended"] * (not served)
    more: dict[str, Any] = {"totals": [totals], "latency": [latency]}
    if problems:
        more["problems"] = [{"problem": text} for text in problems]
    result = publish("soak", settings.bench.out, conditions, minutes, {}, began, SHOWN, **more)
    draw_soak(minutes, blocks, Path(result["folder"]) / "soak.png")
    if problems:
        raise DataError(f"{len(problems)} problems in {settings.minutes:g} minutes, such as: {problems[0]}")
    return result


class _Visits:
    """Loads an adapter every `visit_s`, asks it once, and unloads it, as long as the users' process runs."""

    def __init__(self, settings: ServeBench, server: Server, folder: Path, rows: int) -> None:
        self.settings, self.server, self.folder, self.rows = settings, server, folder, rows
        self.count = 0
        self.errors: list[str] = []

    def __call__(self, users: subprocess.Popen[bytes]) -> None:
        while users.poll() is None:
            try:
                users.wait(self.settings.visit_s)
            except subprocess.TimeoutExpired:
                self._visit()

    def _visit(self) -> None:
        self.count += 1
        (asked,) = requests_of(self.settings, [f"base:{LATE}"], self.rows, 1, self.count)
        try:
            self._post("/v1/load_lora_adapter", {"lora_name": LATE, "lora_path": str(self.folder)})
            try:
                answer = json.loads(self._post("/v1/completions", asked | {"temperature": 0, "ignore_eos": True}))
                if answer["usage"]["completion_tokens"] != asked["max_tokens"]:
                    self.errors.append(f"the adapter {LATE} answered {answer['usage']}")
            finally:
                self._post("/v1/unload_lora_adapter", {"lora_name": LATE})
        except (OSError, ValueError, KeyError) as error:
            self.errors.append(f"visit {self.count} of the adapter {LATE}: {type(error).__name__}: {error}")

    def _post(self, path: str, body: dict[str, Any]) -> str:
        return self.server.post(path, json.dumps(body).encode())


def by_minute(load: Load) -> list[Row]:
    """Return a row for every minute that was looked at: what was answered, and the most memory and blocks in use."""
    begin = load.samples[0].time
    rows: dict[int, Row] = {}
    for sample in load.samples:
        row = rows.setdefault(int(sample.time - begin) // 60, {"resident_bytes": 0, "blocks_used": 0})
        row["resident_bytes"] = max(row["resident_bytes"], sample.resident_bytes)
        row["blocks_used"] = max(row["blocks_used"], sample.used or 0)
    ends = [int(each["end"] - begin) // 60 for each in load.answers]
    arrivals = [int(moment - begin) // 60 for each in load.answers for moment in each["times"]]
    return [
        {"minute": minute, "requests": ends.count(minute), "tokens_per_s": arrivals.count(minute) / 60, **row}
        for minute, row in rows.items()
    ]
