"""Our attention against torch's own, in values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from finhpc.models import attention
from finhpc.models.attention import CausalAttention, attention_forward


@pytest.mark.parametrize("seq", [1, 5, 128, 300])
@pytest.mark.parametrize("score_bytes", [1, 1 << 30])
def test_it_is_torchs_attention(seq: int, score_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SCORE_BYTES", score_bytes)  # one sample at a time, or all
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 2, seq, 16, dtype=torch.float64, requires_grad=True) for _ in range(3))
    ours, theirs = CausalAttention.apply(q, k, v, 0.25), F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    out = torch.randn_like(theirs)
    for mine, other in zip(*(torch.autograd.grad(x, (q, k, v), out) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("seq", [5, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probabilities_computed_again_give_the_same_gradients_to_the_bit(seq: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 2, seq, 16, dtype=dtype, requires_grad=True) for _ in range(3))
    kept, again = (CausalAttention.apply(q, k, v, 0.25, keep) for keep in (True, False))
    assert torch.equal(kept, again)
    out = torch.randn_like(kept)
    gradients = [torch.autograd.grad(x, (q, k, v), out) for x in (kept, again)]
    for mine, other in zip(*gradients, strict=True):
        assert torch.equal(mine, other)


def test_shared_key_heads() -> None:
    q = torch.randn(2, 6, 40, 8)
    k, v = torch.randn(2, 2, 40, 8), torch.randn(2, 2, 40, 8)
    ours, _ = attention_forward(nn.Module(), q, k, v, None)
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(ours, theirs)


def test_bf16_under_autocast_stays_bf16_and_near() -> None:
    q, k, v = (torch.randn(2, 4, 200, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        ours, _ = attention_forward(nn.Module(), q, k, v, None)
    assert ours.dtype == torch.bfloat16
    exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True).transpose(1, 2)
    assert float((ours - exact).detach().norm() / exact.detach().norm()) < 1e-2
    ours.sum().backward()
    assert q.grad is not None
    assert q.grad.dtype == torch.bfloat16


def test_a_mask_dropout_and_long_sequences_go_to_torchs_kernel() -> None:
    q, k, v = (torch.randn(1, 2, 8, 4) for _ in range(3))
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    masked, _ = attention_forward(nn.Module(), q, k, v, mask)
    torch.testing.assert_close(masked.transpose(1, 2), F.scaled_dot_product_attention(q, k, v))
    torch.manual_seed(0)
    dropped, _ = attention_forward(nn.Module(), q, k, v, None, dropout=0.9)
    plain, _ = attention_forward(nn.Module(), q, k, v, None)
    assert not torch.equal(dropped, plain)
