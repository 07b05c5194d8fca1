"""The in-place loss against torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from finhpc.models import loss
from finhpc.models.loss import cross_entropy


@pytest.mark.parametrize("row_bytes", [1, 3 * 4 * 50, 1 << 20])
@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_it_is_torchs_cross_entropy(row_bytes: int, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "ROW_BYTES", row_bytes)
    torch.manual_seed(0)
    hidden = torch.randn(10, 6, requires_grad=True)
    weight, targets = torch.randn(50, 6) * scale, torch.randint(0, 50, (10,))
    ours, theirs = (f(F.linear(hidden, weight), targets) for f in (cross_entropy, F.cross_entropy))
    torch.testing.assert_close(ours, theirs)
    mine, other = (torch.autograd.grad(x * 0.125, hidden)[0] for x in (ours, theirs))
    torch.testing.assert_close(mine, other)


def test_a_hopeless_guess_has_a_finite_loss() -> None:
    logits = torch.tensor([[0.0, 500.0, -500.0]], requires_grad=True)
    assert cross_entropy(logits * 1, torch.tensor([2])).item() == 1000.0


def test_nothing_is_overwritten_where_no_gradient_is_wanted() -> None:
    logits = torch.randn(4, 9)
    before = logits.clone()
    cross_entropy(logits, torch.tensor([0, 1, 2, 3]))
    assert torch.equal(logits, before)


def test_what_is_not_finite_stays_so() -> None:
    logits = torch.tensor([[0.0, float("nan")], [1.0, 2.0]], requires_grad=True)
    assert not torch.isfinite(cross_entropy(logits * 1, torch.tensor([0, 1])))
