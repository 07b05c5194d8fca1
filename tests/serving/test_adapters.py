"""Adapters come and go while the server works: nobody else notices, and what must not be served is refused."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.generation.folders import tiny_adapter, tiny_folder, tiny_model
from tests.serving.server import NAMES, Server, config_of, folders, generated, serving
from tests.waiting import wait_until


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    return folders(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def server(files: tuple[Path, dict[str, Path]], tmp_path: Path) -> Iterator[Server]:
    root = files[0].parent
    with serving(config_of(files[0], tmp_path / "state", {"a0": files[1]["a0"]}, adapter_root=[str(root)])) as server:
        yield server


def call(server: Server, verb: str, **body: str) -> str:
    client: Any = server.client()
    return str(client.post(f"/{verb}_lora_adapter", body=body, cast_to=str))


def text(server: Server, model: str, tokens: int = 16) -> str:
    create: Any = server.client().completions.create
    return str(create(model=model, prompt="the bank", max_tokens=tokens, temperature=0).choices[0].text)


def test_adapters_come_and_go_under_load(server: Server, files: tuple[Path, dict[str, Path]]) -> None:
    base, adapters = files
    expected = {name: generated(base, adapters, "the bank", name, max_new_tokens=16) for name in (None, *adapters)}
    failed: list[object] = []
    done = threading.Event()
    counts = dict.fromkeys(("base", "base:a0"), 0)

    def load(model: str) -> None:
        while not done.is_set():
            try:
                if (got := text(server, model)) != expected[model.partition(":")[2] or None]:
                    failed.append((model, got))
                counts[model] += 1
            except Exception as error:
                failed.append(error)

    threads = [threading.Thread(target=load, args=(model,)) for model in ("base", "base:a0") for _ in range(2)]
    for thread in threads:
        thread.start()
    for name, path in list(adapters.items())[1:] * 3:
        answer = call(server, "load", lora_name=name, lora_path=str(path))
        assert answer == f"Success: LoRA adapter '{name}' added successfully."
        assert text(server, f"base:{name}") == expected[name]
        before = dict(counts)
        wait_until(lambda before=before: all(counts[model] > before[model] for model in counts))  # type: ignore[misc]
        assert "removed" in call(server, "unload", lora_name=name)
        with pytest.raises(openai.NotFoundError, match=f"base:{name} does not exist"):
            text(server, f"base:{name}")
    done.set()
    for thread in threads:
        thread.join()
    assert not failed, failed[:3]
    server.wait_until_idle()


def test_a_name_that_is_used_again_is_another_adapter(server: Server, files: tuple[Path, dict[str, Path]]) -> None:
    """Nothing of the first one is left, such as kept keys and values of a prompt."""
    texts = []
    for path in (files[1]["a1"], files[1]["a2"]):
        call(server, "load", lora_name="x", lora_path=str(path))
        texts.append(text(server, "base:x"))
        call(server, "unload", lora_name="x")
    assert texts == [generated(*files, "the bank", name, max_new_tokens=16) for name in ("a1", "a2")]


def test_running_requests_of_a_removed_adapter_end_as_usual(
    server: Server, files: tuple[Path, dict[str, Path]]
) -> None:
    create: Any = server.client().completions.create
    how = {"prompt": "the bank", "max_tokens": 100, "temperature": 0, "extra_body": {"ignore_eos": True}}
    parts = iter(create(model="base:a0", stream=True, **how))
    got = next(parts).choices[0].text
    call(server, "unload", lora_name="a0")
    got += "".join(part.choices[0].text for part in parts)
    assert got == generated(*files, "the bank", "a0", max_new_tokens=100, stop_at_eos=False)


def test_what_must_not_be_served_is_refused(
    server: Server, files: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    root, model = files[0].parent, tiny_model("llama")
    other = tiny_folder(root / "other", "llama")
    wide = tiny_adapter(root / "wide", model, NAMES[:1], 65, 1)
    foreign = tiny_adapter(root / "foreign", model, NAMES[:1], 2, 1)
    (foreign / "base_fingerprint.json").write_text(json.dumps({"path": str(other), "sha256": "0" * 64}))
    rounded = tiny_adapter(root / "rounded", model, NAMES[:1], 2, 1)
    (rounded / "base_quantization.json").write_text(json.dumps({"bits": 4, "scheme": "nf4"}))
    away = tiny_adapter(tmp_path / "away", model, NAMES[:1], 2, 1)
    (root / "link").symlink_to(away)
    cases = {
        str(wide): "rank 65, and limits.max_adapter_rank=64; start the server with --limits.max_adapter_rank 65",
        str(foreign): "is another model; give its own base",
        str(rounded): "was trained with a base of 4 bits nf4, but the one in memory has 16 bits",
        str(away): "not below a folder that the server may load adapters from",
        str(root / "link"): "not below a folder",
        f"{root}/../{tmp_path.name}/away": "not below a folder",
        str(root / "nothing"): "is not a folder on this machine",
        str(other): "has no adapter_config.json",
    }
    for path, words in cases.items():
        with pytest.raises(openai.BadRequestError, match=words):
            call(server, "load", lora_name="x", lora_path=path)
    for name in ("a/b", "a:b", "", "x" * 65, "../x"):
        with pytest.raises(openai.BadRequestError, match="is not a name"):
            call(server, "load", lora_name=name, lora_path=str(files[1]["a1"]))
    with pytest.raises(openai.BadRequestError, match="loaded already"):
        call(server, "load", lora_name="a0", lora_path=str(files[1]["a1"]))
    with pytest.raises(openai.NotFoundError, match="is not loaded"):
        call(server, "unload", lora_name="x")
    assert [each.id for each in server.client().models.list()] == ["base", "base:a0"]


def test_the_number_of_adapters_is_limited(files: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    config = config_of(
        files[0], tmp_path / "state", {}, adapter_root=[str(files[0].parent)], **{"limits.max_adapters": 1}
    )
    with serving(config) as server:
        call(server, "load", lora_name="a1", lora_path=str(files[1]["a1"]))
        with pytest.raises(openai.BadRequestError, match=r"limits.max_adapters=1 are loaded; unload one first"):
            call(server, "load", lora_name="a2", lora_path=str(files[1]["a2"]))


def test_another_replica_follows_and_a_new_one_starts_with_the_list(
    files: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    """Two servers that share their state, as replicas do."""
    config = config_of(files[0], tmp_path / "state", {"a0": files[1]["a0"]}, adapter_root=[str(files[0].parent)])
    expected = generated(*files, "the bank", "a1", max_new_tokens=16)
    with serving(config) as first, serving(config) as second:
        call(first, "load", lora_name="a1", lora_path=str(files[1]["a1"]))
        assert text(second, "base:a1") == expected
        call(second, "unload", lora_name="a0")
        wait_until(lambda: len(list(first.client().models.list())) == 2)
        call(first, "load", lora_name="moving", lora_path=str(shutil.copytree(files[1]["a2"], files[0].parent / "m")))
        with serving(config.model_copy(update={"adapters": []})) as third:
            assert text(third, "base:a1") == expected
    shutil.rmtree(files[0].parent / "m")
    with serving(config.model_copy(update={"adapters": []})) as again:
        assert text(again, "base:a1") == expected
        with pytest.raises(openai.NotFoundError, match=r"moving does not exist; adapter=.* is not a folder"):
            text(again, "base:moving")
