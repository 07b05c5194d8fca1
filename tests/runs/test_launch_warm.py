"""Pipelines by a group that stays: equal to each other, the same processes, and what becomes of a failure.

`tests.runs.test_faults` compares runs under Ray Train with `unbroken`, which such a group trains.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finhpc.errors import TrainingFailedError
from finhpc.runs.launch_warm import GROUPS, WarmGroup, WarmWorker, free_resources
from finhpc.runs.run import Pruned
from finhpc.training.checkpoint import list_complete
from tests.runs.runs import HALTED_STEP, assert_same_run, outcome, train_warm
from tests.waiting import wait_until


@pytest.fixture
def _warm_group(ray_cluster: None, run_shards: Path, tmp_path: Path) -> Iterator[None]:
    """A group that has trained a run already."""
    train_warm(tmp_path / "short", run_shards, "--train.steps", "2")
    yield
    if GROUPS:
        GROUPS[0].shutdown()


def pids() -> list[int]:
    import ray

    def own(worker: Any) -> int:
        return os.getpid()

    return [int(pid) for pid in ray.get([worker.__ray_call__.remote(own) for worker in GROUPS[0].workers])]


@pytest.mark.usefixtures("_warm_group")
def test_a_killed_worker_costs_what_came_after_the_checkpoint(
    run_shards: Path, unbroken: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    processes = pids()
    assert len(set(processes)) == 2
    whole = train_warm(tmp_path / "whole", run_shards)
    assert pids() == processes, "warm"
    assert_same_run(outcome(tmp_path / "whole"), unbroken)
    held = pytest.approx(unbroken["peak_memory_bytes"], rel=0.05)  # a model left over would double it
    assert whole["peak_memory_bytes"] == held, "nothing of the runs before is left"

    storage, to_kill = tmp_path / "broken", processes[1:]

    def kill_one() -> None:
        if to_kill and [saved for saved in list_complete(storage / "run" / "checkpoints") if saved.step >= HALTED_STEP]:
            os.kill(to_kill.pop(), signal.SIGKILL)

    train_warm(storage, run_shards, poll=kill_one)
    assert not to_kill
    broken = outcome(storage)
    assert len(broken["starts"]) == 2
    assert broken["starts"][1] >= HALTED_STEP
    assert_same_run(broken, unbroken)
    assert "the workers start again" in capfd.readouterr().err

    to_kill += pids()[:1]
    shutil.rmtree(storage)
    with pytest.raises(TrainingFailedError, match=r"more than run\.max_failures=0 times; the last error: worker 0 was"):
        train_warm(storage, run_shards, "--run.max_failures", "0", poll=kill_one)
    assert not GROUPS


@pytest.mark.slow
@pytest.mark.usefixtures("_warm_group")
def test_what_ends_a_trial_ends_its_group(run_shards: Path, unbroken: dict[str, Any], tmp_path: Path) -> None:
    import ray

    taken = ray.available_resources()["CPU"]

    def prune() -> None:
        if list_complete(tmp_path / "run" / "checkpoints"):
            raise Pruned

    with pytest.raises(Pruned):
        train_warm(tmp_path, run_shards, poll=prune)
    assert not GROUPS
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] != "finished"
    train_warm(tmp_path, run_shards)
    assert_same_run(outcome(tmp_path), unbroken)
    (tmp_path / "larger").mkdir()
    train_warm(tmp_path / "larger", run_shards, "--parallel.stages", "1", "--train.steps", "4")
    assert len(pids()) == 1
    GROUPS[0].shutdown()
    wait_until(lambda: ray.available_resources()["CPU"] >= taken + 2)  # Ray counts its room some time after


def test_groups_of_ended_processes_free_their_resources(ray_cluster: None, tmp_path: Path) -> None:
    import ray

    def start() -> None:
        WarmGroup.start(1, {"CPU": 1.0}, tmp_path)

    free = ray.available_resources()["CPU"]
    trial = ray.remote(num_cpus=0)(WarmWorker).remote()
    ray.get(trial.__ray_call__.remote(lambda worker: start()))
    wait_until(lambda: ray.available_resources().get("CPU", 0) == free - 1)
    ray.kill(trial)
    free_resources(tmp_path / "other")
    (group,) = [group for group in ray.util.placement_group_table().values() if str(tmp_path) in group["name"]]
    assert group["state"] == "CREATED", "Ray keeps it"
    free_resources(tmp_path)
    wait_until(lambda: ray.available_resources().get("CPU", 0) == free)
