"""Layers, factorisation, initialisation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from finhpc.errors import ConfigError
from finhpc.lowrank.factorize import truncated_svd
from finhpc.lowrank.layers import LowRankEmbedding, LowRankLinear
from finhpc.lowrank.registry import INITS
from finhpc.lowrank.replace import make_low_rank, ranks_of
from finhpc.settings.pretrain import Method


def test_layers_are_products_of_their_factors() -> None:
    torch.manual_seed(0)
    layer = LowRankLinear(6, 5, 2, bias=True)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(3, 4, 6)
    expected = x @ (layer.B.weight @ layer.A.weight).T + layer.B.bias
    torch.testing.assert_close(layer(x), expected)

    embedding = LowRankEmbedding(7, 5, 2)
    for parameter in embedding.parameters():
        nn.init.normal_(parameter)
    tokens = torch.tensor([[0, 6], [3, 3]])
    torch.testing.assert_close(embedding(tokens), (embedding.A.weight @ embedding.B.weight.T)[tokens])


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (32, 32)])
@pytest.mark.parametrize("rank", [1, 7, 24])
def test_truncated_svd_is_as_good_as_the_full_svd(shape: tuple[int, int], rank: int) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    a, b = truncated_svd(weight, rank)
    assert a.shape == (rank, shape[1])
    assert b.shape == (shape[0], rank)
    singular = torch.linalg.svdvals(weight.double())
    optimum = singular[rank:].square().sum().sqrt()
    error = torch.linalg.norm(weight - b @ a)
    assert error <= optimum * 1.0001 + 1e-5
    # split as square roots: both factors have the same column energies
    torch.testing.assert_close(a.square().sum(1), b.square().sum(0), rtol=1e-4, atol=1e-5)


def test_truncated_svd_survives_a_matrix_of_lower_rank() -> None:
    weight = torch.outer(torch.arange(1.0, 6.0), torch.arange(1.0, 5.0))
    a, b = truncated_svd(weight, 3)
    assert torch.isfinite(a).all()
    assert torch.isfinite(b).all()
    torch.testing.assert_close(b @ a, weight, rtol=1e-5, atol=1e-5)


def test_truncated_svd_refuses_an_impossible_rank() -> None:
    with pytest.raises(ValueError, match="rank=9"):
        truncated_svd(torch.zeros(8, 12), 9)


@pytest.mark.parametrize("name", sorted(set(INITS) - {"sltrain"}))  # its B starts at 0
def test_every_scheme_starts_both_factors_away_from_zero(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(64, 48, generator=generator) * 0.02
    a, b = INITS[name](dense, 16, generator)
    assert a.shape == (16, 48)
    assert b.shape == (64, 16)
    assert a.std() > 1e-3
    assert b.std() > 1e-3


def kind_of(name: str) -> str | None:
    return "attention" if name.endswith("attn") else None


def test_a_rank_that_does_not_fit_names_every_layer() -> None:
    model = nn.ModuleDict({"attn": nn.Linear(8, 8), "other": nn.Linear(8, 8)})
    model["block"] = nn.ModuleDict({"attn": nn.Linear(16, 4)})
    with pytest.raises(ConfigError) as caught:
        make_low_rank(model, {"attention": 9}, kind_of)
    (problem,) = caught.value.problems
    assert problem.startswith(
        "method.rank=9 does not fit block.attn (4 x 16, layers: 1), attn (8 x 8, layers: 1); use 1 to 4 "
    )
    assert isinstance(model["attn"], nn.Linear), "a refused change must change nothing"


def test_rank_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"method\.rank=0 does not fit attn"):
        make_low_rank(nn.ModuleDict({"attn": nn.Linear(8, 8)}), {"attention": 0}, kind_of)


def test_ranks_of_a_method() -> None:
    assert set(ranks_of(Method(kind="dense")).values()) == {None}
    ranks = ranks_of(Method(rank=8, ranks={"mlp": 4}, embedding="low_rank"))
    assert ranks == {"attention": 8, "mlp": 4, "head": 8, "embedding": 8}
    assert ranks_of(Method(rank=8, head="dense"))["head"] is None
    with pytest.raises(ConfigError, match=r"method\.ranks\.mpl: unknown kind of layer; use one of attention"):
        ranks_of(Method(ranks={"mpl": 3}))
