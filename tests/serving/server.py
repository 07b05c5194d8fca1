"""A server in this process, on a free port of this machine: the app as a replica runs it, without Ray."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from openai import OpenAI

from finhpc.generation.generator import Generator
from finhpc.serving.metrics import Metrics
from finhpc.serving.opening import open_served
from finhpc.serving.plan import listed
from finhpc.serving.served import Served
from finhpc.serving.shared import Shared
from finhpc.serving.web import make_app
from finhpc.settings.base import load
from finhpc.settings.generate import GenerateConfig
from finhpc.settings.serve import ServeConfig
from tests.generation.folders import tiny_adapter, tiny_folder, tiny_model
from tests.waiting import free_port, wait_until

TOKEN = "test-token-of-this-machine"
NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.v_proj"]


class Server:
    """`url`: with /v1. `served`, `metrics`: the app's."""

    def __init__(self, url: str, served: Served, metrics: Metrics) -> None:
        self.url, self.served, self.metrics = url, served, metrics
        self.root = url.removesuffix("/v1")

    def client(self, **how: Any) -> OpenAI:
        return OpenAI(**{"base_url": self.url, "api_key": TOKEN, "max_retries": 0, "timeout": 60} | how)

    def wait_until_idle(self) -> None:
        """Wait until no request runs and no block is in use."""
        stats = self.served.engine.batcher.stats
        wait_until(lambda: (s := stats()).running == s.waiting == s.blocks_used == 0)
        wait_until(lambda: self.served.engine.in_work == 0)


def config_of(folder: Path, state: Path, adapters: dict[str, Path], **settings: Any) -> ServeConfig:
    """Settings of a small server with a cache of 64 blocks of 16 tokens."""
    tree = {
        "model": str(folder),
        "name": "base",
        "adapters": [f"{name}={path}" for name, path in adapters.items()],
        "state": str(state),
        "cache.bytes": 64 * 16 * 2 * 2 * 2 * 16 * 4,
        "cache.block_size": 16,
        "limits.max_running": 8,
    }
    return load(ServeConfig, None, tree | settings)


@contextmanager
def serving(config: ServeConfig) -> Iterator[Server]:
    """Serve in a thread of this process until the block ends."""
    shared = Shared(Path(str(config.state)))
    shared.create(listed(config))
    served, metrics = open_served(config, "one")
    app = make_app(served, metrics, hashlib.sha256(TOKEN.encode()).hexdigest())
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", lifespan="on"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield Server(f"http://127.0.0.1:{port}/v1", served, metrics)
    finally:
        server.should_exit = True
        thread.join(30)


def folders(folder: Path) -> tuple[Path, dict[str, Path]]:
    """A llama of milliseconds with a tokenizer, and three adapters of it."""
    base, model = tiny_folder(folder / "base", "llama"), tiny_model("llama")
    adapters = {f"a{i}": tiny_adapter(folder / f"a{i}", model, NAMES[: i + 1], 2 + i, i, base) for i in range(3)}
    return base, adapters


def generated(base: Path, adapters: dict[str, Path], prompt: str, adapter: str | None, **sampling: Any) -> str:
    """The text of `finhpc generate`."""
    entries = [f"{name}={path}" for name, path in adapters.items()]
    generator = Generator(load(GenerateConfig, None, {"model": str(base), "adapters": entries, "sampling": sampling}))
    return generator.stream_text(generator.encode(prompt, adapter), adapter, lambda _: None)
