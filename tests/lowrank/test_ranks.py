"""Ranks from shares, and ranks of single layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from finhpc.errors import ConfigError
from finhpc.lowrank.ranks import rank_of_energy, rank_of_params
from finhpc.lowrank.replace import make_low_rank, target_ranks


@pytest.mark.parametrize(
    ("shape", "share", "rank"),
    [((100, 300), 0.5, 37), ((100, 300), 1.0, 75), ((64, 64), 0.25, 8), ((64, 64), 0.001, 1), ((4, 1), 1.0, 1)],
)
def test_a_share_of_the_parameters(shape: tuple[int, int], share: float, rank: int) -> None:
    assert rank_of_params(*shape, share) == rank


def test_a_share_of_the_energy() -> None:
    values = torch.tensor([3.0, 2.0, 1.0, 1.0, 0.0])  # squares 9 4 1 1 0, of 15
    assert [rank_of_energy(values, share) for share in (0.1, 0.6, 0.61, 13 / 15, 0.9, 1.0)] == [1, 1, 2, 2, 3, 4]
    assert rank_of_energy(torch.zeros(3), 0.5) == 1


def kind_of(name: str) -> str | None:
    return "attention" if name.endswith("attn") else None


def test_single_layers_have_ranks_of_their_own() -> None:
    model = nn.ModuleDict(
        {"0": nn.ModuleDict({"attn": nn.Linear(8, 8)}), "1": nn.ModuleDict({"attn": nn.Linear(8, 8)})}
    )
    assert target_ranks(model, {"attention": 4}, kind_of, {"1.attn": 2}) == {"0.attn": 4, "1.attn": 2}
    assert target_ranks(model, {"attention": None}, kind_of, {"1.attn": 2}) == {"1.attn": 2}
    with pytest.raises(ConfigError, match=r"rank=9 does not fit 1\.attn"):
        make_low_rank(model, {}, kind_of, {"1.attn": 9})
    make_low_rank(model, {}, kind_of, {"1.attn": 2})
    assert isinstance(model["0"]["attn"], nn.Linear)
    assert model["1"]["attn"].A.weight.shape == (2, 8)
