"""`finhpc serve`: what it checks before it starts, and a whole server from its first line to its last request."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

import finhpc
from finhpc.cli import main
from finhpc.errors import ConfigError, FinhpcError
from finhpc.serving.plan import blocks_of, check, memory_of, resolved
from finhpc.serving.served import model_name
from finhpc.serving.token import VARIABLE, given_token, read_token
from finhpc.settings.base import load
from finhpc.settings.serve import ServeConfig
from tests.generation.folders import tiny_adapter, tiny_model
from tests.serving.server import NAMES, folders, generated
from tests.waiting import free_port, last_words, wait_until

SECRET = "a-token-of-48-hexadecimal-digits-or-so"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    return folders(tmp_path_factory.mktemp("serve"))


def settings(files: tuple[Path, dict[str, Path]], **more: Any) -> ServeConfig:
    tree = {"model": str(files[0]), "adapters": [f"{name}={path}" for name, path in files[1].items()]}
    return load(ServeConfig, None, tree | {"port": free_port()} | more)


# -- before it starts -----------------------------------------------------------------------


def test_a_dry_run_counts_memory(
    files: tuple[Path, dict[str, Path]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, SECRET)
    result = finhpc.serve(settings(files, **{"cache.bytes": 100_000, "cache.block_size": 16}), dry_run=True)
    assert result["model_bytes"] == (files[0] / "model.safetensors").stat().st_size
    block = 2 * 2 * 2 * 16 * 16 * 4  # keys and values, layers, heads, their size, tokens, float32
    assert (result["cache_blocks"], result["cache_bytes"]) == (100_000 // block, 100_000 // block * block)
    assert result["cache_tokens"] == result["cache_blocks"] * 16
    assert (result["adapters"], result["name"]) == (["a0", "a1", "a2"], "base")
    shown = capsys.readouterr().err
    assert "base:a0, base:a1, base:a2" in shown
    assert "dry run: nothing was started" in shown
    assert SECRET not in shown


def test_by_default_the_cache_holds_full_requests_within_free_memory(
    files: tuple[Path, dict[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(files, **{"limits.max_running": 4, "cache.block_size": 16})
    assert memory_of(config, check(config)).tokens == 4 * 128

    class Little:
        available = 800_000

    monkeypatch.setattr("psutil.virtual_memory", lambda: Little)
    assert memory_of(config, check(config)).cache <= 200_000
    halves = config.model_copy(update={"replicas": 2})
    assert blocks_of(halves, check(config).config) == blocks_of(config, check(config).config) // 2


def test_every_problem_is_listed_at_once(files: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    wide = tiny_adapter(tmp_path / "wide", tiny_model("llama"), NAMES[:1], 80, 1)
    config = settings(
        files,
        name="a b",
        adapters=[f"x:y={files[1]['a0']}", f"wide={wide}", "gone=nowhere"],
        adapter_root=[str(tmp_path / "missing")],
    )
    with pytest.raises(ConfigError) as caught:
        check(config)
    problems = "\n".join(caught.value.problems)
    for words in ("name=a b is not a name", "adapters=x:y is not a name", "missing is not a folder", "nowhere"):
        assert words in problems
    foreign = tiny_adapter(tmp_path / "foreign", tiny_model("llama"), NAMES[:1], 2, 1)
    (foreign / "base_fingerprint.json").write_text(json.dumps({"path": "elsewhere", "sha256": "0" * 64}))
    with pytest.raises(ConfigError, match=r"was trained with elsewhere .* is another model; give its own base"):
        check(settings(files, adapters=[f"foreign={foreign}"]))
    with pytest.raises(ConfigError, match=r"wide has rank 80, and limits.max_adapter_rank=64"):
        check(settings(files, adapters=[f"wide={wide}"]))
    with pytest.raises(ConfigError, match=r"is too small for a block of 32 tokens, which takes 16,384 bytes;"):
        check(settings(files, **{"cache.bytes": 1000, "cache.block_size": 32}))
    with pytest.raises(ConfigError, match="model is not set"):
        resolved(load(ServeConfig, None, {}))
    with pytest.raises(ConfigError, match=r"3 are more than limits.max_adapters=2"):
        check(settings(files, **{"limits.max_adapters": 2}))


def test_a_runs_folder_is_named_with_the_model_in_it(files: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    shutil.copytree(files[0], tmp_path / "pretrained" / "model")
    shutil.copytree(files[1]["a0"], tmp_path / "finetuned" / "model")
    with pytest.raises(FinhpcError, match=rf"has no config.json; its model is {tmp_path}/pretrained/model\."):
        check(settings(files, model=str(tmp_path / "pretrained"), adapters=[]))
    with pytest.raises(FinhpcError, match=rf"has no adapter_config.json; its adapter is {tmp_path}/finetuned/model\."):
        check(settings(files, adapters=[f"a={tmp_path / 'finetuned'}"]))


def test_a_port_in_use_is_named(files: tuple[Path, dict[str, Path]], capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert main(["serve", "--model", str(files[0]), "--port", str(port)]) == 2
    told = capsys.readouterr().err
    assert f"host=127.0.0.1 port={port} cannot be used (Address already in use); choose another, such as" in told
    assert main(["serve", "--model", str(files[0]), "--host", "10.255.255.1", "--port", str(port)]) == 2
    assert "host=10.255.255.1" in capsys.readouterr().err


def test_an_open_address_is_a_warning(files: tuple[Path, dict[str, Path]], capsys: pytest.CaptureFixture[str]) -> None:
    finhpc.serve(settings(files, host="0.0.0.0"), dry_run=True)
    assert "warning: host=0.0.0.0 is open to other machines, without encryption" in capsys.readouterr().err
    finhpc.serve(settings(files), dry_run=True)
    assert "warning" not in capsys.readouterr().err


def test_the_token_comes_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    file = tmp_path / "token"
    config = ServeConfig(token_file=str(file))
    with pytest.raises(ConfigError, match="does not exist"):
        given_token(config)
    file.write_text(SECRET + "\n")
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="can be read by other users; run `chmod 600"):
        given_token(config)
    file.chmod(0o600)
    assert given_token(config) == SECRET
    file.write_text("short")
    with pytest.raises(ConfigError, match=r"shorter than 16 characters.*openssl rand") as caught:
        given_token(config)
    assert "short\n" not in str(caught.value)
    assert given_token(ServeConfig()) is None
    with pytest.raises(ConfigError, match=f"{VARIABLE} is not set"):
        read_token(ServeConfig())
    monkeypatch.setenv(VARIABLE, SECRET)
    assert read_token(ServeConfig()) == SECRET
    assert "token" not in {name for name in ServeConfig.model_fields if name != "token_file"}


@pytest.mark.parametrize(
    ("path", "name"),
    [("runs/first/model", "first"), ("models/gpt2/", "gpt2"), ("org/some-model", "some-model"), ("model", "model")],
)
def test_the_models_name(path: str, name: str) -> None:
    assert model_name(ServeConfig(model=path)) == name
    assert model_name(ServeConfig(model=path, name="other")) == "other"


def test_an_application_for_a_cluster(files: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    from ray.serve import Application

    from finhpc.serving.app import build
    from finhpc.serving.shared import Shared

    state = tmp_path / "state"
    adapters = [f"{name}={path}" for name, path in files[1].items()]
    args = {"model": str(files[0]), "adapters": adapters, "state": str(state), "resources": {"cpus_per_worker": 2}}
    assert isinstance(build(args), Application)
    assert Shared(state).adapters() == {name: str(path) for name, path in files[1].items()}
    with Shared(state).changing() as listed:
        listed["later"] = "/shared/later"
    build(args)
    assert Shared(state).adapters()["later"] == "/shared/later", "clients have loaded it"
    with pytest.raises(ConfigError, match="state is not set; give a folder that all replicas see"):
        build({"model": str(files[0])})
    with pytest.raises(ConfigError, match="replcas is not a setting; did you mean 'replicas'"):
        build(args | {"replcas": 2})


# -- a whole server -------------------------------------------------------------------------


class Process:
    """`finhpc serve` in a process of its own."""

    def __init__(self, process: subprocess.Popen[str], log: Path, port: int) -> None:
        self.process, self.log, self.root = process, log, f"http://127.0.0.1:{port}"
        self.url = f"{self.root}/v1"

    def client(self, **how: Any) -> OpenAI:
        return OpenAI(**{"base_url": self.url, "api_key": SECRET, "max_retries": 0, "timeout": 400} | how)

    def ask(self, model: str = "base", tokens: int = 16, **how: Any) -> Any:
        how = {"temperature": 0, "extra_body": {"ignore_eos": True}} | how
        return self.client().completions.create(model=model, prompt="the bank", max_tokens=tokens, **how)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(400)


@contextmanager
def started(
    folder: Path, files: tuple[Path, dict[str, Path]], *words: str, token: str | None = SECRET
) -> Iterator[Process]:
    port, log = free_port(), folder / "log"
    adapters = [f"{name}={path}" for name, path in files[1].items()]
    command = [sys.executable, "-P", "-m", "finhpc", "serve", "--model", str(files[0])]
    command += ["--adapters", *adapters] if adapters else []
    environment = {name: value for name, value in os.environ.items() if name not in (VARIABLE, "RAY_ADDRESS")}
    if token is not None:
        environment[VARIABLE] = token
    with open(log, "w") as file, open(folder / "out", "w") as out:
        process = subprocess.Popen(
            [*command, "--name", "base", "--port", str(port), "--json", *words],
            cwd=folder, env=environment, stdout=out, stderr=file, text=True, start_new_session=True,
        )  # fmt: skip
    try:
        wait_until(lambda: "Press Ctrl-C" in log.read_text(), process, log)
        yield Process(process, log, port)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(400)


def test_a_server_from_its_start_to_its_drain(files: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    with started(tmp_path, files, "--limits.max_running", "4", "--drain_s", "300") as server:
        texts = {name: generated(*files, "the bank", name, max_new_tokens=16) for name in (None, *files[1])}
        new_tokens = 0
        for name, text in texts.items():
            model = "base" if name is None else f"base:{name}"
            how = {"extra_body": {}}
            answer = server.ask(model, **how)
            assert answer.choices[0].text == text
            new_tokens += 2 * answer.usage.completion_tokens
            parts = server.ask(model, stream=True, **how)
            assert "".join(part.choices[0].text for part in parts) == text
        with pytest.raises(openai.AuthenticationError):
            server.client(api_key="x" * 20).models.list()
        with pytest.raises(openai.NotFoundError):
            server.ask("other")
        leaving = server.ask(tokens=100, stream=True)
        next(iter(leaving))
        leaving.close()  # a client that goes

        def metric(name: str) -> float:
            client: Any = server.client()
            lines = client.get(f"{server.root}/metrics", cast_to=str).splitlines()
            return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

        wait_until(lambda: metric("finhpc_cache_blocks_used") == metric("finhpc_requests_running") == 0)
        assert new_tokens < metric("finhpc_new_tokens_total") <= new_tokens + 100
        answers: list[tuple[float, float, int]] = []  # begin, end, tokens
        refusals: set[tuple[int, str | None]] = set()
        ending = threading.Event()

        def ask_on(number: int) -> None:
            """Ask again and again, so that a request is always in work, until the server is to end."""
            while not ending.is_set():
                begin = time.monotonic()
                try:
                    answer = server.ask(f"base:a{number % 3}", 120, n=4)
                except openai.InternalServerError as error:
                    refusals.add((error.status_code, error.code))
                else:
                    answers.append((begin, time.monotonic(), answer.usage.completion_tokens))

        with ThreadPoolExecutor(24) as pool:
            asking = [pool.submit(ask_on, number) for number in range(24)]
            wait_until(lambda: metric("finhpc_requests_in_flight") > 24)  # this one, too
            ending.set()
            server.process.send_signal(signal.SIGTERM)
            signaled = time.monotonic()
            assert server.process.wait(400) == 0
            for each in asking:
                each.result()
        assert sum(begin < signaled < end for begin, end, _ in answers) >= 2, "accepted ones finish"
        assert {tokens for _, _, tokens in answers} == {480}
        assert refusals <= {(503, "draining")}
        lines = server.log.read_text().splitlines()
        result = json.loads((tmp_path / "out").read_text().splitlines()[-1])
    assert (result["status"], result["adapters"]) == ("finished", ["a0", "a1", "a2"])
    assert result["requests"] >= 16
    assert result["new_tokens"] >= 480 * len(answers)
    noise = [line for line in lines if any(word in line for word in ("INFO", "WARNING", "pid=", "Traceback"))]
    assert not noise, noise
    assert any("all requests have finished" in line for line in lines)
    assert "the bank" not in "\n".join(line for line in lines if "curl" not in line)
    assert SECRET not in "\n".join(lines)


def test_a_token_is_made_and_printed_once(files: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    with started(tmp_path, (files[0], {}), token=None) as server:
        lines = server.log.read_text()
        token = lines.partition(f"export {VARIABLE}=")[2].split()[0]
        assert lines.count(token) == 1
        assert len(token) >= 32
        assert server.client(api_key=token).models.list().data[0].id == "base"
        with pytest.raises(openai.AuthenticationError):
            server.client().models.list()


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [1, 2])
def test_what_fails_when_a_part_is_killed(files: tuple[Path, dict[str, Path]], replicas: int, tmp_path: Path) -> None:
    """Under load: a replica, the proxy, the controller. No request hangs, and the server answers again.

    A single replica listens itself, without a proxy.
    """
    import psutil

    root, extra = files[0].parent, files[1]["a2"]
    words = ["--replicas", str(replicas), "--resources.cpus_per_worker", "0.5", "--adapter_root", str(root)]
    some = {name: path for name, path in files[1].items() if name != "a2"}
    with started(tmp_path, (files[0], some), *words) as server:
        client: Any = server.client()
        client.post("/load_lora_adapter", body={"lora_name": "late", "lora_path": str(extra)}, cast_to=str)
        expected = generated(*files, "the bank", "a2", max_new_tokens=16)

        def processes(title: str) -> list[psutil.Process]:
            children = psutil.Process(server.process.pid).children(recursive=True)
            return [child for child in children if title in " ".join(child.cmdline())]

        def works() -> bool:
            try:
                answers = [server.ask("base:late", extra_body={}, timeout=20) for _ in range(6)]
                return all(answer.choices[0].text == expected for answer in answers)
            except openai.APIError:
                return False

        for title in ("ServeReplica", *["ProxyActor"] * (replicas > 1), "ServeController"):
            outcomes: list[str] = []

            def load(outcomes: list[str] = outcomes) -> None:
                try:
                    outcomes.append("ok" if server.ask("base:a1", 100, timeout=60).usage else "no usage")
                except openai.APIError as error:
                    outcomes.append(type(error).__name__)

            with ThreadPoolExecutor(8) as pool:
                for _ in range(40):
                    pool.submit(load)
                wait_until(lambda outcomes=outcomes: len(outcomes) >= 4)  # type: ignore[misc]
                processes(title)[0].kill()
            assert len(outcomes) == 40
            print(title, {kind: outcomes.count(kind) for kind in set(outcomes)})
            assert "APITimeoutError" not in outcomes, "a request hangs"
            assert outcomes.count("ok") >= (20 if title == "ServeController" else 1)
            wait_until(works)
        if replicas == 1:
            assert server.stop() == 0, last_words(server.log)
            return
        (files[0] / "config.json").write_text((files[0] / "config.json").read_text() + "\n")  # another version
        processes("ServeReplica")[0].kill()
        wait_until(lambda: "changed since the server started" in server.log.read_text(), server.process, server.log)
        assert server.ask("base:late", extra_body={}).choices[0].text == expected, "the other replica serves on"
        assert server.stop() == 0, last_words(server.log)
