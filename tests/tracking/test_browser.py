"""MLflow's pages in a real browser: what they show before anybody touches them."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finhpc.settings.base import build
from finhpc.settings.finetune import FinetuneConfig
from finhpc.settings.pretrain import PretrainConfig
from finhpc.settings.training import default_tracking_uri
from finhpc.tracking.describe import Dataset, Description, parameters
from finhpc.tracking.tags import PARENT, SWEEP, setting_tags
from finhpc.tracking.tracker import Tracker
from finhpc.training.journal import Journal

pytestmark = [pytest.mark.browser, pytest.mark.slow]
SHARDS = Dataset("news/shards", "ab" * 32, "/data/news/shards")
NAMED = {"model": "gpt2-tiny", "dataset": SHARDS.name, "model.layers": 2, "model.width": 32}


def track(storage: Path, name: str, config: Any, loss: float, varied: dict[str, Any], parent: str = "") -> str:
    """A run as a training leaves it; returns its id."""
    folder = storage / name
    folder.mkdir()
    journal = Journal(folder / "journal.jsonl")
    for step in range(1, 4):
        journal.write("train", step=step, tokens=step, train_loss=loss + 1, lr=1e-3, tokens_per_s=9.0)
    journal.write("eval", step=3, tokens=3, val_loss=loss)
    journal.close()
    system = Journal(folder / "driver.jsonl")
    system.write("system", step=1, cpu_utilization_percentage=50.0)
    system.close()
    tags = setting_tags(config) | ({PARENT: parent, SWEEP: "sweep"} if parent else {})
    params, uri = parameters(config, NAMED, varied), default_tracking_uri(storage)
    tracker = Tracker(Description(folder, uri, "finhpc", name, params, tags, datasets=[SHARDS])).start()
    assert tracker.finish("FINISHED", {"steps": 3, "val_loss": loss, "params_total": 7, "params_dense": 9})
    return str(tracker.run_id)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Path:
    """Plain runs, and two sweeps of nested trials."""
    storage = tmp_path_factory.mktemp("tracked")
    shutil.copy(empty_database, storage / "mlflow.db")
    for i, (kind, rank) in enumerate((("dense", 64), ("low_rank", 8), ("low_rank", 16))):
        config = build(PretrainConfig, {"method": {"kind": kind, "rank": rank}, "run": {"name": f"plain-{i}"}})
        track(storage, f"plain-{i}", config, 5.0 - i, {})
    parent = track(storage, "ranks", build(PretrainConfig, {}), 3.0, {})
    for rank in (4, 8):
        for bits in (16, 8, 4):
            config = build(PretrainConfig, {"method": {"rank": rank}})
            track(storage, f"rank{rank}-{bits}bit", config, rank / bits, {"quantization.bits": bits}, parent)
    parent = track(storage, "lora", build(FinetuneConfig, {}), 2.0, {})
    for rank in (2, 4):
        for bits in (16, 4):
            config = build(FinetuneConfig, {"lora": {"rank": rank}, "quantization": {"bits": bits}})
            track(storage, f"lora{rank}-{bits}", config, rank / bits, {}, parent)
    return storage


@pytest.fixture(scope="module")
def ui(storage: Path) -> Iterator[Any]:
    """`finhpc ui` of a sweep or a run by name, as a process of its own; returns its lines."""
    started = []

    def run(name: str) -> list[str]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        words = ["ui", "--run.storage", str(storage), "--run.name", name, "--port", str(port)]
        log = storage / f"{name}.log"
        with open(log, "wb") as file:
            started.append(subprocess.Popen([sys.executable, "-m", "finhpc.cli", *words], stderr=file, stdout=file))
        deadline = time.monotonic() + 300
        while "Ctrl-C" not in log.read_text():
            assert time.monotonic() < deadline, log.read_text()
            assert started[-1].poll() is None, log.read_text()
            time.sleep(0.2)
        return log.read_text().splitlines()

    yield run
    for process in started:
        process.send_signal(signal.SIGTERM)
        process.wait(180)


def dom(chromium: str, address: str, profile: Path) -> str:
    """What a browser makes of a page once it has loaded everything."""
    words = [chromium, "--headless", "--disable-gpu", f"--user-data-dir={profile}", "--window-size=1680,900"]
    words += ["--no-sandbox"] if os.geteuid() == 0 else []
    words += ["--virtual-time-budget=20000", "--dump-dom", address]
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=400).stdout


@pytest.mark.parametrize(
    ("name", "number", "keys"),
    [("ranks", 6, ["method.rank", "quantization.bits"]), ("lora", 4, ["lora.rank", "quantization.bits"])],
)
def test_a_sweeps_comparison_opens_with_what_varies_and_the_validation_loss(
    chromium: str, ui: Any, tmp_path: Path, name: str, number: int, keys: list[str]
) -> None:
    page, compare, listed, end = ui(name)
    assert page.startswith("MLflow's page: http://127.0.0.1:"), "nothing of its libraries"
    assert compare.startswith(f"compare the {number} runs of {name}: ")
    assert end == "Press Ctrl-C to end it."
    text = dom(chromium, compare.partition(f"of {name}: ")[2], tmp_path / "profile")
    assert f"Comparing {number} Runs from 1 Experiment" in text
    chosen = re.findall(r'class="[^"]*select-selection-item-content[^"]*">([^<]+)<', text)
    assert chosen == [*keys, "val_loss"]
    runs = dom(chromium, listed.partition("of finhpc: ")[2], tmp_path / "profile")
    assert "news/shards" in runs
    assert "val_loss" in runs
    assert "finhpc." not in re.sub(r"<script.*?</script>", "", runs, flags=re.S), "no machinery"


def test_plain_runs_open_with_what_varies(chromium: str, ui: Any, storage: Path, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(default_tracking_uri(storage))
    (experiment,) = [found for found in client.search_experiments() if found.name == "finhpc"]
    runs = client.search_runs([experiment.experiment_id])
    ids = [f"%22{run.info.run_id}%22" for run in runs if run.info.run_name.startswith("plain")]
    address = ui("plain-0")[0].partition("page: ")[2]
    page = f"{address}/#/compare-runs?runs=%5B{','.join(ids)}%5D&experiments=%5B%22{experiment.experiment_id}%22%5D"
    chosen = re.findall(
        r'class="[^"]*select-selection-item-content[^"]*">([^<]+)<', dom(chromium, page, tmp_path / "profile")
    )
    assert chosen == ["method.kind", "method.rank", "val_loss"]
