"""What a study measures and counts of a step, with a real engine in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from finhpc.commands.study.step_times import Run
from finhpc.settings.base import build
from finhpc.settings.pretrain import PretrainConfig
from tests.tiny import tiny_shards
from tests.training.processes import run_processes

WIDTH, LAYERS, SEQ, SAMPLES, RANK = 32, 2, 32, 4, 4


def config(shards: Path, kind: str, optimizer: dict[str, Any]) -> PretrainConfig:
    tree = {
        "model": {"preset": "gpt2-tiny", "layers": LAYERS, "width": WIDTH, "context": 64},
        "method": {"kind": kind, "rank": RANK, "head": "dense"},
        "data": {"shards": str(shards), "seq_len": SEQ},
        "optimizer": optimizer,
        "parallel": {"micro_batch_size": SAMPLES},
    }
    return build(PretrainConfig, tree)


def warmed_up(configs: list[PretrainConfig]) -> list[tuple[float, list[str]]]:
    """The operations of each, and the names of what its optimizer keeps for the first matrix of a block."""
    found = []
    for one in configs:
        run = Run(one, torch.device("cpu"))
        operations = run.warm_up()
        named, state = run.engine.trained_parameters(), run.engine.optimizer.state
        (name,) = [name for name in named if name.startswith("transformer.h.0.mlp.c_fc.") and name.endswith("weight")][
            :1
        ]
        found.append((operations, sorted(state[named[name]])))
    return found


def test_a_step_counts_the_products_of_its_optimizer(tmp_path: Path) -> None:
    """Muon's, by hand: 5 (2 n^2 m + n^3) multiplications for each matrix (n, m), of two operations each."""
    shards = tiny_shards(tmp_path / "shards")
    muon, relora = {"name": "muon"}, {"name": "relora", "rank": RANK}
    work = [config(shards, *how) for how in (("dense", {}), ("dense", muon), ("dense", relora), ("low_rank", {}))]
    work.append(config(shards, "low_rank", muon))
    [((adamw, _), (dense, _), (pairs, kept), (low_rank, _), (factors, _))] = run_processes(warmed_up, 1, work)

    def iterations(*sides: tuple[int, int]) -> float:
        return sum(5.0 * (2 * n**2 * m + n**3) for n, m in sides)

    square, wide = (WIDTH, WIDTH), (WIDTH, 4 * WIDTH)
    assert dense - adamw == 2 * LAYERS * iterations(*[square] * 4, wide, wide)  # q, k and v each for itself
    thin = [(RANK, WIDTH), (RANK, 3 * WIDTH), *[(RANK, WIDTH)] * 2, *[(RANK, WIDTH), (RANK, 4 * WIDTH)] * 2]
    assert factors - low_rank == 2 * LAYERS * iterations(*thin)
    weights = 12 * WIDTH**2
    assert pairs - adamw == pytest.approx(2 * LAYERS * 4 * RANK * weights)
    assert {"left", "right"} < set(kept), "measured with pairs, which most steps train"
