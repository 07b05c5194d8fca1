"""The engine over packs: every topology against transformers and peft in one process."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from finhpc.models.files.source import open_weights
from finhpc.models.lora.model import LoraModel
from finhpc.settings.base import build
from finhpc.settings.finetune import FinetuneConfig
from tests.models.dense import saved, tiny_gpt2, tiny_llama
from tests.models.families import tiny
from tests.models.packs import examples, packs_of, peft_model, peft_parameters, plain_loss
from tests.training.processes import run_processes

PACKS = 4  # a step


def settings(folder: Path, stages: int, replicas: int, dora: bool) -> FinetuneConfig:
    return build(
        FinetuneConfig,
        {
            "model": {"path": str(folder)},
            "lora": {"rank": 4, "init": "orthogonal", "dora": dora, "rslora": dora},
            "optimizer": {"lr": 1e-2, "grad_clip": 0.1, "weight_decay": 0.0},
            "parallel": {"stages": stages, "replicas": replicas, "micro_batches": PACKS // replicas},
            "train": {"steps": 2},
        },
    )


def train(config: FinetuneConfig, folder: Path, packs: list[Tensor], steps: int) -> dict[str, Any]:
    """Losses of `steps` steps over the same packs, the first gradients (clipped), the adapters before and after."""
    from finhpc.training.engine import Engine

    lora_model = LoraModel.of(config, open_weights(folder, low_rank=True))
    engine = Engine(config, lora_model.hf_config, torch.device("cpu"), lora_model=lora_model)
    start = {name: p.detach().clone() for name, p in engine.trained_parameters().items()}
    share = len(packs) // config.parallel.replicas
    mine = packs[engine.replica * share : (engine.replica + 1) * share]
    first: dict[str, Tensor] = {}

    def keep(*_: Any) -> None:
        if not first:
            first.update({n: p.grad.clone() for n, p in engine.trained_parameters().items()})

    engine.optimizer.register_step_pre_hook(keep)
    val = engine.evaluate(mine)
    losses = [engine.train_step(iter(mine), 1e-2) for _ in range(steps)]
    after = {name: p.detach().clone() for name, p in engine.trained_parameters().items()}
    return {"val": val, "losses": losses, "grads": first, "start": start, "after": after, "norm": engine.grad_norm}


@pytest.mark.parametrize(
    ("make", "stages", "replicas", "shared", "dora"),
    [
        (tiny_llama, 1, 1, 6, False),
        (tiny_llama, 2, 2, 6, False),
        (tiny_llama, 2, 1, 0, False),
        (tiny_gpt2, 1, 2, 0, False),
        (tiny_gpt2, 2, 1, 6, False),
        (tiny_llama, 2, 2, 6, True),
        (tiny_gpt2, 1, 1, 0, True),
        (partial(tiny, "Gemma 3"), 2, 1, 6, False),
        (partial(tiny, "GPT-NeoX"), 2, 1, 6, False),
    ],
)
def test_losses_gradients_and_steps_are_pefts(
    tmp_path: Path, make: Any, stages: int, replicas: int, shared: int, dora: bool
) -> None:
    folder = saved(make(), tmp_path / "base")
    some = examples(8)
    packs = packs_of(some, 8 // PACKS, shared)
    ranks = run_processes(train, stages * replicas, settings(folder, stages, replicas, dora), folder, packs, 2)
    start, after, grads = (
        {n: v for rank in ranks for n, v in rank[key].items()} for key in ("start", "after", "grads")
    )
    plain = peft_model(folder, start, lora={"use_dora": dora, "use_rslora": dora})
    trained = peft_parameters(plain)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(2):
        loss = plain_loss(plain, some)
        if step == 0:
            assert all(abs(rank["val"] - loss.item()) <= 1e-5 * loss.item() for rank in ranks)
        assert all(abs(rank["losses"][step] - loss.item()) <= 1e-5 * loss.item() for rank in ranks)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), 0.1)
        assert norm > 0.1
        if step == 0:
            assert set(grads) == set(trained)
            for name, p in trained.items():
                assert (grads[name] - p.grad).norm() <= 1e-5 * p.grad.norm(), name
        optimizer.step()
    assert all(abs(rank["norm"] - norm.item()) <= 1e-4 * norm.item() for rank in ranks)
    for name, p in trained.items():
        assert (after[name] - p).norm() <= 1e-4 * p.norm(), name
