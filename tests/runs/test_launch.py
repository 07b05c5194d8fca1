"""Leaving a training in the middle: nothing of it goes on, and Ray can be left."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from finhpc.runs.launch import worker_environment
from finhpc.runs.watch import watch


def sleep_for_ever(arguments: dict[str, Any]) -> None:
    Path(arguments["started"]).touch()
    time.sleep(600)


@pytest.mark.usefixtures("ray_cluster")
def test_an_interrupted_training_is_over_before_ray_is_left(tmp_path: Path) -> None:
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    started = tmp_path / "started"
    ray_trainer = TorchTrainer(
        sleep_for_ever,
        train_loop_config={"started": str(started)},
        scaling_config=ScalingConfig(num_workers=1),
        run_config=RunConfig(storage_path=str(tmp_path)),
    )

    def look() -> None:
        if started.exists():
            raise KeyboardInterrupt

    free = ray.available_resources()["CPU"]
    with pytest.raises(KeyboardInterrupt):
        watch(ray_trainer.fit, look)
    assert not [thread for thread in threading.enumerate() if thread.name == "finhpc-ray"]
    # Ray learns a moment after a worker ended that its CPUs are free.
    until = time.monotonic() + 180
    while ray.available_resources().get("CPU", 0) < free and time.monotonic() < until:
        time.sleep(0.1)
    assert ray.available_resources()["CPU"] >= free, "its worker is gone"


def test_workers_environment_keeps_what_the_command_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GOMP_SPINCOUNT", "PYTORCH_CUDA_ALLOC_CONF", "MALLOC_ARENA_MAX"):
        monkeypatch.delenv(name, raising=False)
    on_cpu, on_gpu = worker_environment(cuda=False), worker_environment(cuda=True)
    assert on_cpu["GOMP_SPINCOUNT"] == on_gpu["GOMP_SPINCOUNT"] == "1000"
    assert on_cpu["MALLOC_ARENA_MAX"] == "1"
    assert "PYTORCH_CUDA_ALLOC_CONF" not in on_cpu
    assert on_gpu["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"

    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    monkeypatch.setenv("GOMP_SPINCOUNT", "5")
    own = worker_environment(cuda=True)
    assert own == {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64", "GOMP_SPINCOUNT": "5"}
