"""Recomputation in the engine: the same training to the bit, over stages and micro-batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from finhpc.models.pipeline import parts_of
from finhpc.training.activation_bytes import saved_bytes
from tests.training.processes import run_processes
from tests.training.test_engine import CASES, SAMPLES, SEQ, hf_config, lr_at, settings, tokens

RUNS = [(case, dropout) for case in CASES for dropout in (0.0, 0.1) if not (dropout and case.startswith("llama"))]


def _kept(engine: Any) -> int:
    """Bytes that this stage's blocks keep for one micro-batch."""

    def forward() -> Any:
        data: Any = torch.randn(SAMPLES // 4, SEQ, 32, requires_grad=True), tokens(1)[: SAMPLES // 4]
        for layer in engine.layers:
            data = layer(data) if layer.part.in_block else data
        return data

    engine.pipe.module.train()
    return saved_bytes(forward, *engine.layers)


def _trained(stages: int, steps: int) -> list[dict[str, list[Any]]]:
    """For each run and mode: bytes kept, losses, norms and this process's weights after some steps."""
    from finhpc.training.engine import Engine

    results = []
    for case, dropout in RUNS:
        found: dict[str, list[Any]] = {}
        for recompute in ("none", "attention", "full"):
            config = settings(case, stages, 1, 4, recompute=recompute)
            config.model.dropout = dropout
            hf = hf_config(config)
            row = parts_of(hf, recompute)  # type: ignore[arg-type]
            second = next(i for i, part in enumerate(row) if part.in_block and part.names[0].split(".")[2] == "1")
            borders = [0, second, len(row)] if stages == 2 else [0, len(row)]
            torch.manual_seed(stages)
            engine = Engine(config, hf, torch.device("cpu"), borders)
            values: list[Any] = []
            for step in range(1, steps + 1):
                batches = iter(tokens(step).split(SAMPLES // 4))
                values += [engine.train_step(batches, lr_at(config, step)), engine.grad_norm]
            values.append(engine.evaluate(tokens(99).split(SAMPLES // 4)))
            named = engine.named_parameters()
            weights = {name: named[name].detach().clone() for name in sorted(named)}
            found[recompute] = [_kept(engine), *values, weights]
        results.append(found)
    return results


@pytest.mark.parametrize("stages", [1, 2])
def test_every_mode_trains_the_same_to_the_bit(stages: int) -> None:
    for rank in run_processes(_trained, stages, stages, 3):
        for (case, dropout), found in zip(RUNS, rank, strict=True):
            kept, *plain, weights = found["none"]
            for recompute in ("attention", "full"):
                less, *values, mine = found[recompute]
                assert less < kept, (case, dropout, recompute)
                assert values == plain, (case, dropout, recompute)
                assert mine.keys() == weights.keys()
                assert all(torch.equal(mine[name], weights[name]) for name in weights), (case, dropout, recompute)
