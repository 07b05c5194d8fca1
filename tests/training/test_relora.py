"""ReLoRA against layers that have a frozen matrix and a pair, trained as in its authors' code, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finhpc.errors import collect
from finhpc.models.initialize import generator_of
from finhpc.settings.base import build
from finhpc.settings.pretrain import PretrainConfig
from finhpc.settings.training import Optimizer
from finhpc.training.optimizers.registry import check_optimizer, check_taken
from finhpc.training.optimizers.schedules import learning_rate
from finhpc.training.optimizers.stage import StageOptimizer, make_optimizer, moments, set_lr, state_bytes

STEPS, EVERY, RANK, OUT, INTO = 17, 4, 3, 5, 7
NAME = "h.0.fc.weight"


def settings(**values: Any) -> Optimizer:
    shared = {"name": "relora", "lr": 0.02, "restart_every": EVERY, "rank": RANK, "schedule": "restarts"}
    return Optimizer.model_validate({**shared, "restart_warmup_steps": 2, "warmup_steps": 2, **values})


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x = torch.randn(16, INTO, generator=generator, dtype=torch.float64)
        yield x, torch.randn(16, OUT, generator=generator, dtype=torch.float64).tanh() + x[:, :OUT]


def loss_of(x: Tensor, y: Tensor, output: Tensor) -> Tensor:
    return (output.tanh() - y).square().mean()


def begin() -> Tensor:
    return torch.randn(OUT, INTO, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def authors(given: Optimizer) -> list[Tensor]:
    """W + s B A after each step; s = 32 / rank. The pair is a module's, and what a restart does is as in their code."""
    w, found, scale = nn.Parameter(begin()), list[Tensor](), 32 / RANK
    dense = given.dense_cycles * EVERY
    of = {"betas": given.betas, "eps": given.eps, "weight_decay": given.weight_decay}
    whole = torch.optim.AdamW([w], **of)
    a, b = nn.Parameter(w.new_zeros(RANK, INTO)), nn.Parameter(w.new_zeros(OUT, RANK))
    pair = whole
    for step, (x, y) in enumerate(batches(), 1):
        if step > dense and (step - 1) % EVERY == 0:
            w.requires_grad_(False)
            w.data += scale * b.data @ a.data
            drawn = torch.rand(RANK, INTO, generator=generator_of(step, f"{NAME}.relora")).double()
            a.data, b.data = (2 * drawn - 1) / INTO**0.5, torch.zeros_like(b)
            pair = torch.optim.AdamW([a, b], **of)
        optimizer = whole if step <= dense else pair
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(given, step, STEPS)
        loss_of(x, y, nn.functional.linear(x, w) + scale * x @ a.T @ b.T).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        found.append((w + scale * b @ a).detach().clone())
    return found


def ours(given: Optimizer, by_inputs: bool) -> tuple[list[Tensor], StageOptimizer, nn.Parameter]:
    w = nn.Parameter((begin().T if by_inputs else begin()).float().contiguous())
    optimizer, found = make_optimizer({NAME: w}, given, by_inputs={NAME} if by_inputs else ()), list[Tensor]()
    for step, (x, y) in enumerate(batches(), 1):
        set_lr(optimizer, learning_rate(given, step, STEPS))
        optimizer.zero_grad()
        matrix = w.T if by_inputs else w
        loss_of(x, y, nn.functional.linear(x.float(), matrix)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        found.append((w.T if by_inputs else w).detach().double().clone())
    return found, optimizer, w


@pytest.mark.parametrize("dense_cycles", [0, 1, 2])
@pytest.mark.parametrize("by_inputs", [False, True])
def test_the_steps_are_those_of_a_frozen_matrix_and_its_pairs(by_inputs: bool, dense_cycles: int) -> None:
    given = settings(dense_cycles=dense_cycles, weight_decay=0.1)
    expected, (found, optimizer, w) = authors(given), ours(given, by_inputs)
    for step, (value, exact) in enumerate(zip(found, expected, strict=True), 1):
        torch.testing.assert_close(value, exact, rtol=0, atol=2e-5, msg=lambda text, step=step: f"step {step}: {text}")
    changed = found[-1] - found[dense_cycles * EVERY - 1 if dense_cycles else 0]
    assert torch.linalg.matrix_rank(changed, atol=1e-4) > RANK, "several pairs add up to a higher rank"
    kept = moments(optimizer, w)
    assert {key: value.numel() for key, value in kept.items()} == {
        f"{what}{factor}": RANK * (OUT if (factor == "left") != by_inputs else INTO)
        for what in ("", "exp_avg_", "exp_avg_sq_")
        for factor in ("left", "right")
    }
    assert state_bytes([(NAME, (OUT, INTO))], given) == max(
        sum(value.nbytes for value in kept.values()), 8 * OUT * INTO if dense_cycles else 0
    )


def test_the_first_step_of_a_pair_by_hand() -> None:
    """AdamW's first step moves B, which is 0, by the learning rate, and A by nothing, as its gradient is 0."""
    weight = nn.Parameter(torch.zeros(2, 2))
    optimizer = make_optimizer({NAME: weight}, settings(rank=1, dense_cycles=0, weight_decay=0.0))
    set_lr(optimizer, 0.001)
    weight.grad = torch.tensor([[1.0, 2.0], [-3.0, -4.0]])
    optimizer.step()
    [(x, y)] = moments(optimizer, weight)["right"].tolist()
    assert max(abs(x), abs(y)) <= 2**-0.5
    signs = torch.tensor([1.0 if x + 2 * y > 0 else -1.0, 1.0 if -3 * x - 4 * y > 0 else -1.0])
    expected = -32 * 0.001 * signs[:, None] * torch.tensor([[x, y]])  # s = 32 / 1
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(moments(optimizer, weight)["left"].flatten(), -0.001 * signs, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (
            {"name": "relora", "restart_every": 50, "dense_cycles": 2},
            "optimizer.dense_cycles x restart_every = 2 x 50 = 100 steps, and train.steps=100; lower one of them",
        ),
        (
            {"schedule": "restarts", "restart_every": 20, "restart_warmup_steps": 20},
            "optimizer.restart_warmup_steps=20 leaves nothing of optimizer.restart_every=20 for the cosine; use 19 or",
        ),
        (
            {"name": "relora", "rank": 33},
            "optimizer.rank=33 does not fit transformer.h.*.fc.weight (64 x 32, layers: 2); use 1 to 32.",
        ),
        ({"name": "relora"}, "optimizer.name=relora updates dense matrices in transformer blocks, and this model"),
    ],
)
def test_settings_that_leave_no_pairs_are_refused(optimizer: dict[str, Any], message: str) -> None:
    config = build(PretrainConfig, {"optimizer": optimizer, "train": {"steps": 100}})
    dense = {f"transformer.h.{i}.fc.weight": (64, 32) for i in range(2)} if "rank" in optimizer else {}
    problems = config.problems()
    with collect(problems):
        check_optimizer(config.optimizer)
    with collect(problems):
        check_taken(config.optimizer, dense | {"wte.weight": (90, 32)})
    assert any(message in problem for problem in problems)
    fits = {"name": "relora", "restart_every": 50, "rank": 32, "schedule": "restarts"}
    good = build(PretrainConfig, {"optimizer": fits, "train": {"steps": 51}})
    assert good.problems() == []
    check_optimizer(good.optimizer)
    check_taken(good.optimizer, {"transformer.h.0.fc.weight": (64, 32)})
