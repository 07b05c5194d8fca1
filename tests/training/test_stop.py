"""Workers that are asked to stop: all after the same step, with a checkpoint, and the run continues bit-equal."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from finhpc.models.initialize import random_fill
from finhpc.training.batches import TokenBatches
from finhpc.training.checkpoint import list_complete
from finhpc.training.workers import stop
from finhpc.training.workers.stop import AHEAD, Stop
from tests.training.processes import run_processes
from tests.training.test_blend import STEPS, losses, settings, stream, tokens
from tests.training.test_engine import SEQ, hf_config

ASKED = 4  # the step after which the workers are asked to stop


def starts(folder: Path) -> list[tuple[int, list[int]]]:
    """Over two stages: an unbroken run, one that is asked to stop, and its continuation; each one's last step."""
    from finhpc.training.trainer import Trainer

    config = settings(2, train={"checkpoint_every": 0}, kind="low_rank")
    rank = dist.get_rank()

    class Asked(Trainer):
        def _step(self, step: int) -> None:
            super()._step(step)
            if rank == 0:
                self.stop._next_look = 0.0
                if step == ASKED and self.folder.name == "asked" and not stop.is_requested(self.folder):
                    stop.request(self.folder)
            else:
                time.sleep(0.05 * (step % 3))  # the workers do not end their steps at the same time

    last = []
    for name in ("whole", "asked", "asked"):
        if rank == 0:
            (folder / name).mkdir(exist_ok=True)
            if name == "asked":
                shutil.copy2(folder / "whole" / "stages.json", folder / name)  # bit-equal over the same cut alone
            stop.reset(folder / name)
        dist.barrier()
        hf = hf_config(config)
        worker = Asked(
            config=config,
            hf_config=hf,
            fill=random_fill(hf, config.train.seed, config.method.init),
            device=torch.device("cpu"),
            folder=folder / name,
            source=TokenBatches(config.parallel, stream, tokens(99).reshape(-1, SEQ).numpy()),
        )
        worker.run()
        last.append((worker.engine.step, [saved.step for saved in list_complete(folder / name / "checkpoints")]))
    return last


def test_all_stop_after_the_same_step_and_continue_bit_equal(tmp_path: Path) -> None:
    for last in run_processes(starts, 2, tmp_path):
        whole, asked, again = last
        assert whole == (STEPS, [STEPS])
        assert asked == (ASKED + AHEAD, [ASKED + AHEAD])
        assert again == (STEPS, [STEPS, ASKED + AHEAD])
    assert losses(tmp_path / "asked") == losses(tmp_path / "whole")


def test_a_worker_that_is_past_the_last_step_is_an_error(tmp_path: Path) -> None:
    class Store:
        def check(self, keys: list[str]) -> bool:
            return True

        def get(self, key: str) -> bytes:
            return b"5"

    late: Any = Stop.__new__(Stop)
    late.run, late.world_rank, late.key, late.store, late.step = tmp_path, 1, "stop-a", Store(), None
    with pytest.raises(RuntimeError, match="took step 6, after step 5"):
        late.is_due(6)
