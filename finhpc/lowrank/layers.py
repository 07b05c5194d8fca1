"""The two low-rank layers: a linear layer and an embedding as a product of narrow matrices.

FinGPT-HPC, section III.B, eq. (5): W (out x in) becomes B A with A (rank x in), B (out x rank).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LowRankLinear(nn.Module):
    """y = B(A x) + bias.

    `A`: (rank, in_features). `B`: (out_features, rank). `bias`: (out_features,) or None.
    Maps (..., in_features) to (..., out_features). Other ways to be low-rank derive from it.
    """

    init = "normal"  # the scheme it starts with where none is named, see `finhpc.lowrank.initialize`
    mergeable = True  # whether B A is the whole layer, so that one dense matrix can take its place

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.A = nn.Parameter(torch.empty(rank, in_features))
        self.B = nn.Parameter(torch.empty(out_features, rank))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.between(F.linear(x, self.A)), self.B, self.bias)

    @staticmethod
    def between(narrow: Tensor) -> Tensor:
        """What happens to A x before B; nothing here."""
        return narrow

    def pair(self) -> tuple[Tensor, Tensor]:
        """A (rank, in_features), B (out_features, rank)."""
        return self.A, self.B

    @staticmethod
    def product(a: Tensor, b: Tensor) -> Tensor:
        """W (out_features, in_features)."""
        return b @ a

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, rank={self.rank}, bias={self.bias is not None}"


class LowRankEmbedding(nn.Module):
    """The row of A for each token, mapped by B: the embedding matrix is A B^T.

    `A`: (num_embeddings, rank), stored so that a token is one row. `B`: (dim, rank).
    Maps int64 (...) to (..., dim).
    """

    init = "normal"

    def __init__(self, num_embeddings: int, dim: int, rank: int) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.rank = num_embeddings, dim, rank
        self.A = nn.Parameter(torch.empty(num_embeddings, rank))
        self.B = nn.Parameter(torch.empty(dim, rank))

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(F.embedding(tokens, self.A), self.B)

    def pair(self) -> tuple[Tensor, Tensor]:
        """(rank, num_embeddings) and (dim, rank): views, the first of A transposed."""
        return self.A.T, self.B

    @staticmethod
    def product(a: Tensor, b: Tensor) -> Tensor:
        """The embedding matrix (num_embeddings, dim)."""
        return a @ b.T

    def extra_repr(self) -> str:
        return f"num_embeddings={self.num_embeddings}, dim={self.embedding_dim}, rank={self.rank}"


class FactorLinear(nn.Module):
    """`LowRankLinear`, or a class derived from it, with its factors as linear layers of their own.

    Quantised models have these: bitsandbytes, and our own packed layers, take the place of an `nn.Linear`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool,
        between: Callable[[Tensor], Tensor] = LowRankLinear.between,
    ) -> None:
        super().__init__()
        self.A = nn.Linear(in_features, rank, bias=False)
        self.B = nn.Linear(rank, out_features, bias=bias)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.B(self.between(self.A(x)))  # type: ignore[no-any-return]


class FactorEmbedding(nn.Module):
    """`LowRankEmbedding` with its factors as an embedding and a linear layer."""

    def __init__(self, num_embeddings: int, dim: int, rank: int) -> None:
        super().__init__()
        self.A = nn.Embedding(num_embeddings, rank)
        self.B = nn.Linear(rank, dim, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.B(self.A(tokens))  # type: ignore[no-any-return]
