"""The two low-rank layers: a linear layer and an embedding as a product of narrow matrices.

FinGPT-HPC, section III.B, eq. (5): W (out x in) becomes B A with A (rank x in), B (out x rank). A and B are ordinary
modules, so a quantizer that replaces every `nn.Linear` replaces the factors too.
"""

from __future__ import annotations

from torch import Tensor, nn


class LowRankLinear(nn.Module):
    """y = B(A x) + bias.

    `A.weight`: (rank, in_features). `B.weight`: (out_features, rank). `B.bias`: (out_features,) or None.
    Maps (..., in_features) to (..., out_features). Other ways to be low-rank derive from it.
    """

    init = "normal"  # the default way to initialize it, see `finhpc.lowrank.initialize`
    mergeable = True  # whether B A is the whole layer, so that one dense matrix can replace it

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.A = nn.Linear(in_features, rank, bias=False)
        self.B = nn.Linear(rank, out_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.B(self.between(self.A(x)))  # type: ignore[no-any-return]

    def as_product(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return z (..., k) and Z (out_features, k), whose product z Z^T is the layer's output without its bias."""
        return self.between(self.A(x)), self.B.weight

    @staticmethod
    def between(narrow: Tensor) -> Tensor:
        """Apply what happens to A x before B; nothing here."""
        return narrow

    def pair(self) -> tuple[Tensor, Tensor]:
        """Return A (rank, in_features) and B (out_features, rank)."""
        return self.A.weight, self.B.weight

    @staticmethod
    def product(a: Tensor, b: Tensor) -> Tensor:
        """Return W (out_features, in_features)."""
        return b @ a


class LowRankEmbedding(nn.Module):
    """The row of A for each token, mapped by B: the embedding matrix is A B^T.

    `A.weight`: (num_embeddings, rank), so that a token is one row. `B.weight`: (dim, rank).
    Maps int64 (...) to (..., dim).
    """

    init = "normal"

    def __init__(self, num_embeddings: int, dim: int, rank: int) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.rank = num_embeddings, dim, rank
        self.A = nn.Embedding(num_embeddings, rank)
        self.B = nn.Linear(rank, dim, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.B(self.A(tokens))  # type: ignore[no-any-return]

    def pair(self) -> tuple[Tensor, Tensor]:
        """Return A^T (rank, num_embeddings), a view, and B (dim, rank)."""
        return self.A.weight.T, self.B.weight

    @staticmethod
    def product(a: Tensor, b: Tensor) -> Tensor:
        """Return the embedding matrix (num_embeddings, dim) of `A.weight` and `B.weight`."""
        return a @ b.T


LowRank = LowRankLinear | LowRankEmbedding


def is_factor(model: nn.Module, name: str) -> bool:
    """Return whether the module of that name is the A or B of a low-rank layer."""
    parent, _, child = name.rpartition(".")
    return child in ("A", "B") and isinstance(model.get_submodule(parent), LowRank)
