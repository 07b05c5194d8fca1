"""Attention over blocks of tokens on a GPU: torch's fused kernels, which never hold all scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from finhpc.models.attention import attention_forward
from tests.gpu import CUDA, DEVICE, held_bytes, needs_gpu, peak_of

pytestmark = needs_gpu

HEADS, SIZE = 4, 64


def attended(heads: list[Tensor], dropout: float = 0.0) -> Tensor:
    """What a model's attention makes of queries, keys and values."""
    module: Any = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = HEADS // heads[1].shape[1], True
    return attention_forward(module, *heads, None, dropout=dropout)[0]


def drawn(shared: int, seq: int) -> list[Tensor]:
    """Queries, keys, values of `shared` heads for HEADS of queries."""
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(2, n, seq, SIZE, generator=draw).requires_grad_() for n in (HEADS, shared, shared)]


@pytest.mark.parametrize("shared", [HEADS, 2])
def test_outputs_and_gradients_are_the_cpus(shared: int) -> None:
    plain = drawn(shared, 96)
    mine = [x.detach().to(DEVICE).requires_grad_() for x in plain]
    out = attended(mine)
    wanted = F.scaled_dot_product_attention(*plain, is_causal=True, enable_gqa=True).transpose(1, 2)
    found = [out, *torch.autograd.grad(out.square().sum(), mine)]
    expected = [wanted, *torch.autograd.grad(wanted.square().sum(), plain)]
    for value, right in zip(found, expected, strict=True):
        assert (value.cpu() - right).norm() <= 1e-5 * right.norm()


@pytest.mark.skipif(not CUDA, reason="with dropout the CPU's kernels hold all scores")
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("shared", [HEADS, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_scores_are_held(dtype: torch.dtype, shared: int, dropout: float) -> None:
    seq = 2048
    mine = [x.detach().to(DEVICE, dtype).requires_grad_() for x in drawn(shared, seq)]

    def work() -> None:
        attended(mine, dropout).sum().backward()

    work()
    taken = peak_of(work) - held_bytes()
    assert taken < 0.75 * 2 * HEADS * seq * seq * dtype.itemsize
