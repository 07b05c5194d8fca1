"""What tests of several packages share: one Ray per test process, quick trainings, and real text."""

from __future__ import annotations

import gc
import os
import re
import shutil
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch

import finhpc  # turns usage reports off before Ray is imported
from tests.runs.runs import launch_quickly, outcome, train_warm
from tests.tiny import tiny_shards

# Test processes share the cores, and threads that wait for each other's cores take several times as long. Processes
# that pytest-xdist or a test starts inherit the variable; here torch is imported already.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file runs in one test process, and all files that use the `unbroken` run in the same, which trains it once."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "unbroken" if uses_unbroken(config.rootpath / file) else file

    return ByFile(config, log)


@cache
def uses_unbroken(path: Path) -> bool:
    return bool(re.search(r"\bunbroken[:\"]", path.read_text(encoding="utf-8")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With several test processes, files with long tests start first."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    os.environ.pop("COLUMNS", None)  # pytest-xdist passes the terminal's width on; commands would fold their tables
    fixtures: dict[Path, set[str]] = {}
    for item in items:
        fixtures.setdefault(item.path, set()).update(getattr(item, "fixturenames", ()))
    items.sort(key=lambda item: next((i for i, name in enumerate(LONG) if name in fixtures[item.path]), len(LONG)))


def pytest_collection_finish() -> None:
    """Leave what was imported out of later garbage collections, each of which would take a second."""
    gc.collect()
    gc.freeze()


LONG = ("unbroken", "cluster", "ray_cluster")  # fixtures of tests that take long, longest first


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """A test that draws weights draws the same ones in every run, its module's fixtures too."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray for the whole run; more logical CPUs than cores, so that Ray Data finds room beside workers."""
    import ray

    assert finhpc.TELEMETRY_OFF
    # Ray Train polls its workers every 2 s by default; its controller inherits this from the process that starts Ray.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
    ray.init(
        "local",
        num_cpus=6,
        object_store_memory=512 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield
    ray.shutdown()


@pytest.fixture
def quick_training(warm_workers: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`pretrain` and `finetune` train in this process, or by workers that stay for a module's next run.

    Ray Train starts new processes for every run, which takes ten seconds. Tests of what it does train without this.
    """
    from finhpc.commands import finetune, pretrain
    from finhpc.runs.run import run

    for module in (finetune, pretrain):
        monkeypatch.setattr(module, "run", partial(run, launch=launch_quickly))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    gc.collect()  # an engine refers to itself; other tests count the tensors of this process


@pytest.fixture(scope="module")
def warm_workers(ray_cluster: None) -> Iterator[None]:
    """Workers of `launch_warm` end with the module."""
    from finhpc.runs import launch_warm

    yield
    if launch_warm.GROUPS:
        launch_warm.GROUPS[0].shutdown()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real text and labels: FINHPC_DATA, or ../shared/data beside the repository."""
    folder = Path(os.environ.get("FINHPC_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not (folder / "text").is_dir():
        pytest.skip(f"no real text at {folder}; set FINHPC_DATA to a folder that holds text/*.jsonl")
    return folder


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database (making one takes seconds)."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(scope="session")
def chromium() -> str:
    """A browser that runs without a screen."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no chromium or google-chrome on PATH")
    return found


@pytest.fixture(scope="session")
def run_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_shards(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture(scope="session")
def unbroken(ray_cluster: None, run_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run by warm workers, which every interrupted run of the same settings must equal."""
    storage = tmp_path_factory.mktemp("unbroken")
    result = train_warm(storage, run_shards)
    return outcome(storage) | {"peak_memory_bytes": result["peak_memory_bytes"]}
