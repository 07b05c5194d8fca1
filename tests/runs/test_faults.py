"""Whole runs hurt on purpose: what they survive goes on to the same numbers, what they do not is one clear line."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from finhpc.commands.pretrain import pretrain
from finhpc.errors import TrainingFailedError
from finhpc.runs.worker import _repeats
from finhpc.settings.base import build
from finhpc.settings.pretrain import PretrainConfig
from finhpc.training.checkpoint import MANIFEST, list_complete
from finhpc.training.journal import read
from tests.runs.runs import (
    HALTED_STEP,
    assert_same_run,
    command,
    last_words,
    outcome,
    ray_process,
    train_workers,
    wait_for_record,
    wait_for_step,
)
from tests.runs.storm import storm, table
from tests.tiny import pretrain_tree
from tests.waiting import PATIENCE_S, wait_until

PAUSES = ("--plugins", "tests.runs.pauses")


def errors(storage: Path) -> list[str]:
    """The lines with which the command says what went wrong."""
    return [line for line in (storage / "stderr").read_text().splitlines() if line.startswith("error: ")]


def wait_for_manifest(storage: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    manifest = storage / "run" / "checkpoints" / f"step_{step:08d}" / MANIFEST
    wait_until(manifest.exists, process, storage / "stderr", pause_s=0.001)


def test_a_run_killed_in_a_save_and_workers_that_hang_or_are_killed(
    run_shards: Path, unbroken: dict[str, Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "halt").touch()
    more = ("--train.hang_timeout_s", "15", *PAUSES)
    with command(tmp_path, run_shards, *more) as process:
        wait_until((run / "halted").exists, process, tmp_path / "stderr")
        assert (tmp_path / ".ray" / "auth_token").stat().st_mode & 0o077 == 0, "the token is the user's alone"
        halfway = run / "checkpoints" / f"step_{HALTED_STEP:08d}"
        assert list(halfway.glob("*.safetensors"))
        assert not (halfway / MANIFEST).exists()
        process.kill()
        assert process.wait(PATIENCE_S) == -signal.SIGKILL
    with command(tmp_path, run_shards, *more) as process:
        wait_for_manifest(tmp_path, 45, process)
        hung = train_workers(process)[1]
        hung.suspend()
        wait_for_manifest(tmp_path, 90, process)
        assert not hung.is_running(), "it was ended, though it could not end itself"
        train_workers(process)[0].kill()
        # With `PAUSES` the workers are still there when they wrote that they are done.
        wait_for_record(tmp_path, process, lambda record: record["kind"] == "finished")
        last = train_workers(process)[0]
        last.suspend()
        assert process.wait(PATIENCE_S) == 0, last_words(tmp_path)
        assert not last.is_running()
    resumed = outcome(tmp_path)
    first, second, third, fourth = resumed["starts"]  # none for the worker that hung when all was done
    assert (first, second) == (0, HALTED_STEP - 15)
    assert third >= 45
    assert fourth >= 90
    assert_same_run(resumed, unbroken)
    # `last` leaves an empty file if it was stopped before its watchdog was.
    (stacks,) = [path for path in (run / "stacks").glob("*.txt") if path.stat().st_size]
    assert "made no progress for 15 s (train.hang_timeout_s=15)" in stacks.read_text()
    assert "in start_step" in stacks.read_text(), "it stood in a step, waiting for its neighbor"
    assert f"its stacks are in {stacks}" in (tmp_path / "stderr").read_text()


@pytest.mark.slow
def test_a_full_disk_a_damaged_checkpoint_a_cut_record_of_ray_and_a_kill_too_many(
    run_shards: Path, unbroken: dict[str, Any], tmp_path: Path
) -> None:
    with command(tmp_path, run_shards) as process:
        wait_for_step(tmp_path, 46, process)
        for worker in train_workers(process):  # no file may grow beyond this: the next save fails
            worker.rlimit(psutil.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        assert process.wait(PATIENCE_S) == 1
    (line,) = errors(tmp_path)
    assert "could not be written" in line
    assert "make room" in line
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "failed"
    newest, before = list_complete(tmp_path / "run" / "checkpoints")
    for saved in (newest, before):
        assert sum(saved.verify_files(saved.manifest["files"])) > 0

    os.truncate(newest.path / "stage-00001-replica-00000.safetensors", 1000)
    (attempt,) = (path for path in (tmp_path / "run" / "ray").iterdir() if path.is_dir())
    (attempt / "checkpoint_manager_snapshot.json").write_text('{"checkpoint_res')
    with command(tmp_path, run_shards, "--run.max_failures", "0") as process:
        wait_for_step(tmp_path, 76, process)
        train_workers(process)[1].kill()
        assert process.wait(PATIENCE_S) == 1
    killed = "\n".join(errors(tmp_path)[1:])
    assert "more than run.max_failures=0 times" in killed
    assert "worker 1 was killed from outside, most often by the kernel when memory runs out" in killed
    assert "lower parallel.micro_batch_size (now 2;" in killed

    with command(tmp_path, run_shards) as process:
        assert process.wait(PATIENCE_S) == 0, last_words(tmp_path)
    assert f"checkpoint {newest.path.name} is damaged" in (tmp_path / "stderr").read_text()
    resumed = outcome(tmp_path)
    assert resumed["starts"] == [0, before.step, 75]
    assert_same_run(resumed, unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["raylet", "gcs_server"])
def test_the_command_ends_when_ray_dies_and_resumes(
    name: str, run_shards: Path, unbroken: dict[str, Any], tmp_path: Path
) -> None:
    with command(tmp_path, run_shards) as process:
        wait_for_step(tmp_path, 33, process)
        ray_process(process, name).kill()
        assert process.wait(PATIENCE_S) == 1
    assert f"Ray's process {name} died; stopping." in (tmp_path / "stderr").read_text()
    # Without its GCS, Ray may end the command itself, with the same code, before the error is shown.
    assert errors(tmp_path) in (
        [
            f"error: Ray's process {name} died (killed, or out of memory?), and with it the workers. "
            "The same command resumes from the newest checkpoint."
        ],
        [],
    )
    with command(tmp_path, run_shards) as process:
        assert process.wait(PATIENCE_S) == 0, last_words(tmp_path)
    resumed = outcome(tmp_path)
    assert resumed["starts"][-1] >= 30
    assert_same_run(resumed, unbroken)


def config(shards: Path, storage: Path, **sections: Any) -> PretrainConfig:
    sections["train"] = {"steps": 4, "checkpoint_every": 2} | sections.get("train", {})
    return build(PretrainConfig, pretrain_tree(shards, storage, **sections))


@pytest.mark.slow
@pytest.mark.usefixtures("quick_training")
def test_only_damaged_checkpoints_are_never_taken_for_a_new_run(run_shards: Path, tmp_path: Path) -> None:
    pretrain(config(run_shards, tmp_path))
    for file in (tmp_path / "run" / "checkpoints").glob("*/stage-*.safetensors"):
        os.truncate(file, 10)
    with pytest.raises(TrainingFailedError, match=r"every checkpoint in .* is damaged .*step_00000004.*step_00000002"):
        pretrain(config(run_shards, tmp_path, train={"steps": 6}))
    records, _ = read(tmp_path / "run" / "journal.jsonl")
    assert len([record for record in records if record["kind"] == "start"]) == 1


@pytest.mark.usefixtures("ray_cluster")
def test_memory_that_is_not_there_is_one_line_of_advice(run_shards: Path, tmp_path: Path) -> None:
    """A feed-forward part that no address space holds: the allocator refuses it on any machine."""
    vast = config(run_shards, tmp_path, model={"mlp_width": 2**44}, method={"kind": "dense"}, run={"max_failures": 50})
    with pytest.raises(TrainingFailedError) as caught:
        pretrain(vast)
    message = str(caught.value)
    assert message.startswith("memory ran out on worker 0 in step 1: ")
    for key in ("parallel.micro_batch_size", "data.seq_len", "train.precision=bf16", "parallel.stages"):
        assert key in message
    assert "\n" not in message
    attempts = list((tmp_path / "run" / "ray").glob("attempt-*"))
    assert len(attempts) == 1


def test_memory_that_runs_out_again_at_the_same_step_is_fatal(tmp_path: Path) -> None:
    def ran_out(step: int, attempt: str, resumed_from: int = 0) -> bool:
        return _repeats(tmp_path, SimpleNamespace(step=step, attempt=attempt, resumed_from=resumed_from))  # type: ignore[arg-type]

    assert ran_out(0, "a"), "in the first step after a start: the same will happen again"
    assert not ran_out(7, "a"), "later: perhaps something else filled the machine"
    assert not ran_out(7, "a"), "the same start, another worker"
    assert not ran_out(9, "b"), "further than before"
    assert ran_out(9, "c")


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_storm_changes_nothing(tmp_path: Path) -> None:
    seconds = float(os.environ.get("FINHPC_STORM_S", "150"))
    it = storm(tmp_path, seconds, seed=0, gap=(1, 4), chunk=500)
    print(table(it))
    assert it.problems == []
    assert len([event for event in it.events if "fault" in event]) >= 3
