"""Servers that are measured: each a process on a free port of this machine, with a token."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from finhpc.errors import ConfigError
from finhpc.serving.token import VARIABLE

START_S = 600.0  # vLLM compiles when it starts
STOP_S = 90.0
POLL_S = 0.2
ANSWER_S = 120.0


class Server:
    """A server that runs. `models`: names that requests give; `root`: its URL without a path."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, token: str, models: Sequence[str]) -> None:
        self.process, self.token, self.models = process, token, list(models)
        self.root = f"http://127.0.0.1:{port}"

    def get(self, path: str) -> str:
        """Return what a path answers. Raises `OSError` if it does not, or refuses."""
        return self._call(urllib.request.Request(self.root + path))

    def post(self, path: str, body: bytes) -> str:
        """Return what a call answers. Raises `OSError` as `get` does."""
        return self._call(urllib.request.Request(self.root + path, body, {"Content-Type": "application/json"}))

    def _call(self, request: urllib.request.Request) -> str:
        request.add_header("Authorization", f"Bearer {self.token}")
        with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
            text: str = answer.read().decode()
        return text

    def gauges(self, *names: str) -> list[int]:
        """Return Prometheus metrics, each summed over its labels."""
        lines = self.get("/metrics").splitlines()
        return [
            int(sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name} ", f"{name}{{"))))
            for name in names
        ]

    def cpu_s(self) -> float:
        """Return the processor time of the process and its descendants so far."""
        return sum(map(cpu_s, self.processes()))

    def processes(self) -> list[psutil.Process]:
        """Return the process and its descendants."""
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]


def cpu_s(process: psutil.Process) -> float:
    """Return the processor time of a process so far; 0 if it has ended."""
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)


def largest_bytes(processes: Sequence[psutil.Process]) -> int:
    """Return the resident memory of the largest of some processes."""
    sizes = [0]
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            sizes.append(process.memory_info().rss)
    return max(sizes)


@contextmanager
def finhpc_server(
    model: str, adapters: Mapping[str, Path], words: Sequence[str], threads: int, log: Path
) -> Iterator[Server]:
    """`finhpc serve`, with the settings of `words`; its models are the adapters, or the base if there are none."""
    command = [sys.executable, "-P", "-m", "finhpc", "serve", "--model", model, "--name", "base", *words]
    command += ["--resources.threads", str(threads)]
    if adapters:
        command += ["--adapters", *(f"{name}={folder}" for name, folder in adapters.items())]
    token = secrets.token_urlsafe(24)
    own = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {VARIABLE: token}
    with _running(command, "--port", own, log, token, [f"base:{name}" for name in adapters] or ["base"]) as server:
        _wait(server, "/ready", log)
        yield server


@contextmanager
def vllm_server(
    python: str, model: Path, adapters: Mapping[str, Path], settings: Mapping[str, str], threads: int, log: Path
) -> Iterator[Server]:
    """vLLM's server of OpenAI's API on the CPU, in another environment. `settings`: words without the dashes."""
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--host", "127.0.0.1"]
    command += [
        "--served-model-name",
        "base",
        *(word for name, value in settings.items() for word in (f"--{name}", value)),
    ]
    if adapters:
        command += ["--enable-lora", "--max-loras", str(len(adapters)), "--lora-modules"]
        command += [f"base:{name}={folder}" for name, folder in adapters.items()]
    token = secrets.token_urlsafe(24)
    dropped = ("PYTHONPATH", "OMP_NUM_THREADS", "VIRTUAL_ENV")
    own = {name: value for name, value in os.environ.items() if name not in dropped}
    own["PATH"] = f"{Path(python).parent}{os.pathsep}{own['PATH']}"
    own |= {
        "VLLM_API_KEY": token,
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with _running(command, "--port", own, log, token, [f"base:{name}" for name in adapters] or ["base"]) as server:
        _wait(server, "/health", log)
        yield server


@contextmanager
def _running(
    command: Sequence[str], flag: str, environment: dict[str, str], log: Path, token: str, models: Sequence[str]
) -> Iterator[Server]:
    """Run a server in a session of its own, and end all of it after the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [*command, flag, str(port)], env=environment, stdout=file, stderr=file, cwd=log.parent,
            start_new_session=True,
        )  # fmt: skip
    try:
        yield Server(process, port, token, models)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _wait(server: Server, path: str, log: Path) -> None:
    """Wait until a path answers. Raises `ConfigError` with the end of the log if the server ends before."""
    deadline = time.monotonic() + START_S
    while True:
        try:
            server.get(path)
            return
        except (OSError, urllib.error.URLError):
            if server.process.poll() is not None or time.monotonic() > deadline:
                text = log.read_text(encoding="utf-8", errors="replace").strip()[-1500:]
                raise ConfigError(f"the server of {log.stem} did not start; its last words:\n{text}") from None
            time.sleep(POLL_S)
