"""Pipelines by a group that stays: equal to Ray Train's, the same processes, and what becomes of a failure."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from finhpc.commands.pretrain import Pretrain, pretrain
from finhpc.errors import TrainingFailedError
from finhpc.runs.launch_warm import GROUPS, WarmGroup, WarmWorker, free_resources, launch_warm
from finhpc.runs.run import Pruned, run
from finhpc.settings.base import build
from finhpc.settings.pretrain import PretrainConfig
from finhpc.training.checkpoint import list_complete
from finhpc.training.journal import WORKER_FILE, latest, read
from tests.tiny import pretrain_tree

STEPS = 40


@pytest.fixture
def warm_groups(ray_cluster: None) -> Iterator[None]:
    yield
    if GROUPS:
        GROUPS[0].shutdown()


def settings(shards: Path, storage: Path, name: str, stages: int = 2, **run_: Any) -> PretrainConfig:
    tree = pretrain_tree(
        shards,
        storage,
        model={"layers": 3},
        train={"steps": STEPS, "eval_every": 10, "checkpoint_every": 10},
        parallel={"stages": stages},
        resources={"cpus_per_worker": 0.5, "device": "cpu"},
        run={"name": name} | run_,
    )
    return build(PretrainConfig, tree)


def by_warm(config: PretrainConfig, look: Callable[[], None] = lambda: None) -> dict[str, Any]:
    return run(Pretrain(config), launch=partial(launch_warm, poll=look))


def cut_as(storage: Path, other: str, name: str) -> None:
    """Give a run the stages of another: they are cut by measured times, and sums of other parts round otherwise."""
    (storage / name).mkdir()
    shutil.copy(storage / other / "stages.json", storage / name)


def losses(storage: Path, name: str) -> tuple[dict[int, Any], dict[int, Any]]:
    records, _ = read(storage / name / WORKER_FILE)
    return (
        {step: (r["train_loss"], r["grad_norm"]) for step, r in latest(records, "train").items()},
        {step: r["val_loss"] for step, r in latest(records, "eval").items()},
    )


def pids() -> list[int]:
    import ray

    def own(worker: Any) -> int:
        return os.getpid()

    return [int(pid) for pid in ray.get([m.__ray_call__.remote(own) for m in GROUPS[0].workers])]


@pytest.mark.usefixtures("warm_groups")
def test_trials_by_one_group_are_those_of_ray_train(run_shards: Path, tmp_path: Path) -> None:
    plain = pretrain(settings(run_shards, tmp_path, "plain"))
    cut_as(tmp_path, "plain", "first")
    first = by_warm(settings(run_shards, tmp_path, "first"))
    processes = pids()
    cut_as(tmp_path, "plain", "second")
    second = by_warm(settings(run_shards, tmp_path, "second"))
    assert pids() == processes, "warm"
    assert len(set(processes)) == 2
    assert losses(tmp_path, "plain") == losses(tmp_path, "first") == losses(tmp_path, "second")
    assert len(losses(tmp_path, "plain")[0]) > 0
    assert plain["consumed_sha256"] == first["consumed_sha256"] == second["consumed_sha256"]
    held = pytest.approx(first["peak_memory_bytes"], rel=0.05)  # a model left over would double it
    assert second["peak_memory_bytes"] == held, "nothing of the first is left in the second"
    files = sorted((tmp_path / "plain" / "model").glob("*.safetensors"))
    assert files
    assert all((tmp_path / "second" / "model" / file.name).read_bytes() == file.read_bytes() for file in files)


@pytest.mark.usefixtures("warm_groups")
def test_a_killed_worker_costs_what_came_after_the_checkpoint(
    run_shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    by_warm(settings(run_shards, tmp_path, "whole"))
    journal, to_kill = tmp_path / "broken" / WORKER_FILE, pids()[1:]

    def kill_one() -> None:
        records, _ = read(journal)
        saved = list_complete(tmp_path / "broken" / "checkpoints")
        if to_kill and saved and any(r["kind"] == "train" and r["step"] > 11 for r in records):
            os.kill(to_kill.pop(), signal.SIGKILL)

    cut_as(tmp_path, "whole", "broken")
    by_warm(settings(run_shards, tmp_path, "broken"), kill_one)
    assert not to_kill
    records, _ = read(journal)
    starts = [record["step"] for record in records if record["kind"] == "start"]
    assert len(starts) == 2
    assert starts[1] >= 10
    assert losses(tmp_path, "broken") == losses(tmp_path, "whole")
    assert "the workers start again" in capfd.readouterr().err

    to_kill += pids()[:1]
    shutil.rmtree(tmp_path / "broken")
    cut_as(tmp_path, "whole", "broken")
    with pytest.raises(TrainingFailedError, match=r"more than run\.max_failures=0 times; the last error: worker 0 was"):
        by_warm(settings(run_shards, tmp_path, "broken", max_failures=0), kill_one)
    assert not GROUPS
    assert by_warm(settings(run_shards, tmp_path, "broken", max_failures=0))["steps"] == STEPS
    assert losses(tmp_path, "broken") == losses(tmp_path, "whole")


@pytest.mark.slow
@pytest.mark.usefixtures("warm_groups")
def test_what_ends_a_trial_ends_its_group(run_shards: Path, tmp_path: Path) -> None:
    import ray

    free = ray.available_resources()["CPU"]

    def prune() -> None:
        if losses(tmp_path, "pruned")[1]:
            raise Pruned

    with pytest.raises(Pruned):
        by_warm(settings(run_shards, tmp_path, "pruned"), prune)
    assert not GROUPS
    assert json.loads((tmp_path / "pruned" / "result.json").read_text())["status"] != "finished"
    assert by_warm(settings(run_shards, tmp_path, "next"))["status"] == "finished"
    by_warm(settings(run_shards, tmp_path, "larger", stages=3))
    assert len(pids()) == 3
    assert losses(tmp_path, "larger")[1] == pytest.approx(losses(tmp_path, "next")[1], rel=1e-5)
    GROUPS[0].shutdown()
    deadline = time.monotonic() + 180
    while ray.available_resources()["CPU"] < free:  # Ray counts it some time after
        assert time.monotonic() < deadline, "its room is given back"
        time.sleep(0.2)


def test_groups_of_ended_processes_free_their_resources(ray_cluster: None, tmp_path: Path) -> None:
    import ray

    def start() -> None:
        WarmGroup.start(1, {"CPU": 1.0}, tmp_path)

    def until(cpus: float) -> None:
        deadline = time.monotonic() + 180
        while ray.available_resources().get("CPU", 0) != cpus:
            assert time.monotonic() < deadline, ray.available_resources()
            time.sleep(0.1)

    free = ray.available_resources()["CPU"]
    trial = ray.remote(num_cpus=0)(WarmWorker).remote()
    ray.get(trial.__ray_call__.remote(lambda worker: start()))
    until(free - 1)
    ray.kill(trial)
    free_resources(tmp_path / "other")
    (group,) = [group for group in ray.util.placement_group_table().values() if str(tmp_path) in group["name"]]
    assert group["state"] == "CREATED", "Ray keeps it"
    free_resources(tmp_path)
    until(free)
