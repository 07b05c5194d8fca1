"""The loss by rows, which never has all logits, against torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from finhpc.lowrank.blend import BlendLinear
from finhpc.lowrank.cola import ColaLinear
from finhpc.lowrank.layers import LowRankLinear
from finhpc.models import loss
from finhpc.models.lora.layers import FrozenLowRankLinear, LoraLinear
from finhpc.models.loss import head_loss, linear_cross_entropy
from finhpc.quantization.frozen import FrozenFloat
from tests.models.losses import rows_per_piece


@pytest.mark.parametrize("rows", [1, 3, 10])
@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_it_is_torchs_cross_entropy(rows: int, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    rows_per_piece(monkeypatch, rows, 50, 4)
    torch.manual_seed(0)
    hidden = torch.randn(10, 6, requires_grad=True)
    weight = (torch.randn(50, 6) * scale).requires_grad_()
    targets = torch.randint(0, 50, (10,))
    ours, theirs = linear_cross_entropy(hidden, weight, targets), F.cross_entropy(F.linear(hidden, weight), targets)
    torch.testing.assert_close(ours, theirs)
    mine, other = (torch.autograd.grad(x * 0.125, (hidden, weight)) for x in (ours, theirs))
    torch.testing.assert_close(mine, other)


def test_a_bfloat16_loss_is_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 32).bfloat16(), torch.randn(500, 32).bfloat16().requires_grad_()
    targets = torch.randint(0, 500, (64,))
    exact = F.cross_entropy((hidden @ weight.T).double(), targets)
    whole = linear_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(whole.double(), exact, rtol=1e-6, atol=0)
    (at_once,) = torch.autograd.grad(whole, weight)
    rows_per_piece(monkeypatch, 4, 500, 2)
    (by_rows,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), weight)
    assert (at_once.float() - by_rows.float()).norm() < 5e-3 * at_once.float().norm()


def heads() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    tied, dense, pair, cola = nn.Embedding(50, 6), nn.Linear(6, 50, False), LowRankLinear(6, 50, 3, False), None
    cola, blended = ColaLinear(6, 50, 3, False), BlendLinear(6, 50, 3, False)
    nn.init.normal_(blended.W)
    blended.alpha.fill_(0.3)
    dense_base = FrozenFloat(torch.randn(50, 6), None)
    low_rank_base = FrozenLowRankLinear(
        FrozenFloat(torch.randn(3, 6), None), FrozenFloat(torch.randn(50, 3), None), ColaLinear.between
    )
    adapters = {
        f"adapter on {name}": LoraLinear(base, torch.randn(2, 6), torch.randn(50, 2), 0.5)
        for name, base in (("dense", dense_base), ("cola", low_rank_base))
    }
    return {
        "tied": tied, "dense": dense, "low-rank": pair, "cola": cola, "blend": blended, "frozen": dense_base,
        "frozen cola": low_rank_base, **adapters,
    }  # fmt: skip


@pytest.mark.parametrize("name", heads())
def test_every_output_layer_has_the_loss_of_its_logits(name: str) -> None:
    head = heads()[name]
    hidden, targets = torch.randn(10, 6, requires_grad=True), torch.randint(0, 50, (10,))
    logits = F.linear(hidden, head.weight) if isinstance(head, nn.Embedding) else head(hidden)
    wanted = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    ours, theirs = head_loss(hidden, head, targets), F.cross_entropy(logits, targets)
    torch.testing.assert_close(ours, theirs)
    mine, other = (torch.autograd.grad(x, wanted) for x in (ours, theirs))
    torch.testing.assert_close(mine, other)


def test_an_odd_vocabulary_is_padded_only_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(10, 6, requires_grad=True), torch.randn(50, 6, requires_grad=True)
    targets = torch.randint(0, 50, (10,))
    plain = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), (hidden, weight))
    monkeypatch.setattr(loss, "_aligned", lambda matrix: F.pad(matrix, (0, 0, 0, 78)))  # as on a GPU
    rows_per_piece(monkeypatch, 4, 128, 4)
    padded = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), (hidden, weight))
    torch.testing.assert_close(plain, padded)
    assert padded[1].shape == weight.shape


def test_a_hopeless_guess_has_a_finite_loss() -> None:
    weight = torch.tensor([[0.0], [500.0], [-500.0]], requires_grad=True)
    assert linear_cross_entropy(torch.ones(1, 1), weight, torch.tensor([2])).item() == 1000.0


def test_what_is_not_finite_stays_so() -> None:
    weight = torch.tensor([[float("nan")], [1.0]], requires_grad=True)
    assert not torch.isfinite(linear_cross_entropy(torch.ones(2, 1), weight, torch.tensor([0, 1])))


def test_its_peak_memory_is_as_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """`loss.peak_bytes` is what plans count with."""
    from finhpc.training.memory import counted_peak

    rows_per_piece(monkeypatch, 16, 5_000, 2)
    hidden, weight = torch.randn(64, 32).bfloat16().requires_grad_(), torch.randn(5_000, 32).bfloat16().requires_grad_()
    targets = torch.randint(0, 5_000, (64,))
    before = counted_peak(lambda: None)[1]
    _, peak = counted_peak(lambda: linear_cross_entropy(hidden, weight, targets))
    counted = loss.peak_bytes(64, 5_000, 32, 2, "cpu")
    assert abs(peak - before - counted) < 0.03 * counted
