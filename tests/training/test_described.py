"""Two stages of every family that runs whole layers, against a plain torch loop over transformers' own model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from finhpc.models.files.source import open_weights
from finhpc.models.initialize import weights_fill
from finhpc.settings.base import build
from finhpc.settings.pretrain import PretrainConfig
from tests.models.dense import saved
from tests.models.families import ROWS, tiny
from tests.training.processes import run_processes

SAMPLES, SEQ, STEPS, LR = 4, 32, 2, 1e-2
CONFIG = build(
    PretrainConfig,
    {
        "method": {"kind": "dense"},
        "data": {"seq_len": SEQ},
        "optimizer": {"lr": LR, "grad_clip": 0.1, "weight_decay": 0.1},
        "parallel": {"stages": 2, "micro_batch_size": 2, "micro_batches": 2},
        "train": {"steps": STEPS},
    },
)


def tokens(step: int) -> Tensor:
    return torch.randint(0, 300, (SAMPLES, SEQ), generator=torch.Generator().manual_seed(step))


def train(folders: dict[str, Path]) -> dict[str, list[float]]:
    """Losses of each row's model on this stage, the last one on held-out tokens."""
    from finhpc.training.engine import Engine

    losses = {}
    for row, folder in folders.items():
        weights = open_weights(folder)
        engine = Engine(CONFIG, weights.config, torch.device("cpu"), fill=weights_fill(weights))
        batches = [list(tokens(step).split(2)) for step in range(STEPS + 1)]
        losses[row] = [engine.train_step(iter(batch), LR) for batch in batches[:STEPS]]
        losses[row].append(engine.evaluate(batches[STEPS]))
    return losses


def plain(folder: Path) -> list[float]:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").train()
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    adam = CONFIG.optimizer
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=adam.betas, eps=adam.eps)
    losses = []
    for step in range(STEPS):
        loss = model(tokens(step), labels=tokens(step)).loss
        loss.backward()
        assert torch.nn.utils.clip_grad_norm_(parameters, 0.1) > 0.1
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    with torch.no_grad():
        return [*losses, model.eval()(tokens(STEPS), labels=tokens(STEPS)).loss.item()]


def test_two_stages_train_as_one_plain_loop(tmp_path: Path) -> None:
    folders = {row: saved(tiny(row), tmp_path / row) for row in ROWS}
    ranks = run_processes(train, 2, folders)
    for row, folder in folders.items():
        for rank in ranks:
            assert rank[row] == pytest.approx(plain(folder), rel=2e-5), row
