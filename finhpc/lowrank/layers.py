"""The two low-rank layers: a linear layer and an embedding as a product of narrow matrices.

FinGPT-HPC, section III.B, eq. (5): W (out x in) becomes B A with A (rank x in), B (out x rank). A and B are ordinary
modules, so a quantizer that replaces every `nn.Linear` replaces the factors too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LowRankLinear(nn.Module):
    """y = B(A x) + bias; with several `blocks`, y = [B_1 A_1 x, B_2 A_2 x, ...] + bias: a pair per block of outputs.

    `A.weight`: (blocks * rank, in_features). `B.weight`: (out_features, rank), in which block i has its share of the
    rows, in order. `B.bias`: (out_features,) or None. Maps (..., in_features) to (..., out_features). Blocks are for a
    layer that computes queries, keys and values at once. Other ways to be low-rank derive from this class.
    """

    init = "normal"  # the default way to initialize it, see `finhpc.lowrank.initialize`
    mergeable = True  # whether B A is the whole layer, so that one dense matrix can replace it

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool, blocks: int = 1) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank, self.blocks = in_features, out_features, rank, blocks
        self.A = nn.Linear(in_features, blocks * rank, bias=False)
        self.B = nn.Linear(rank, out_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return expand(self.B, self.latent(x), self.blocks)

    def latent(self, x: Tensor) -> Tensor:
        """Return what B is applied to: (..., rank), or (..., blocks, rank)."""
        return latent_of(self.A(x), self.between, self.blocks)

    def as_product(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return z (..., k) and Z (out_features, k), whose product z Z^T is the layer's output without its bias."""
        return as_product(self.latent(x), self.B.weight, self.blocks)

    @staticmethod
    def between(narrow: Tensor) -> Tensor:
        """Apply what happens to the A x of one pair, (..., rank), before B; nothing here."""
        return narrow

    def pair(self) -> tuple[Tensor, Tensor]:
        """Return A (rank, in_features) and B (out_features, rank).

        With several blocks: views (blocks, rank, in_features) and (blocks, out_features / blocks, rank) of them.
        """
        return self.in_blocks(self.A.weight, self.B.weight)

    def in_blocks(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Return A and B of the shapes of `A.weight` and `B.weight` with a first dimension for blocks, if any."""
        return (split(a, self.blocks), split(b, self.blocks)) if self.blocks > 1 else (a, b)

    def product(self, a: Tensor, b: Tensor, s: Tensor | None = None) -> Tensor:
        """Return W (out_features, in_features) of A and B of the shapes of `A.weight` and `B.weight`.

        `s`: the third tensor of an SLTrain layer.
        """
        a, b = self.in_blocks(a, b)
        return (b @ a).reshape(self.out_features, self.in_features)


def split(rows: Tensor, blocks: int) -> Tensor:
    """Return a view (blocks, rows / blocks, columns) of a matrix."""
    return rows.view(blocks, -1, rows.shape[-1])


def latent_of(narrow: Tensor, between: Callable[[Tensor], Tensor], blocks: int) -> Tensor:
    """Return `between` of the A x of each pair: (..., rank), or (..., blocks, rank)."""
    return between(narrow if blocks == 1 else narrow.unflatten(-1, (blocks, -1)))


def expand(b: nn.Module, latent: Tensor, blocks: int) -> Tensor:
    """Return the product of B, a linear layer, with what `latent_of` returns, plus the bias of B.

    A quantized B computes all of its rows for the latent of every block, because its layer only has that product.
    """
    if blocks == 1:
        return b(latent)  # type: ignore[no-any-return]
    if type(b) is not nn.Linear:
        products = b(latent.reshape(-1, latent.shape[-1]))  # bitsandbytes takes at most three dimensions
        products = products.view(*latent.shape[:-1], blocks, -1)  # (..., block of the latent, block of B, rows)
        return products.diagonal(dim1=-3, dim2=-2).mT.flatten(-2)  # type: ignore[no-any-return]
    biases = [None] * blocks if b.bias is None else b.bias.chunk(blocks)
    pieces = zip(latent.unbind(-2), split(b.weight, blocks), biases, strict=True)
    return torch.cat([F.linear(z, rows, bias) for z, rows, bias in pieces], -1)


def as_product(latent: Tensor, b: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """Return z and Z as `LowRankLinear.as_product`, with B between the blocks of Z filled up by zeros."""
    return (latent, b) if blocks == 1 else (latent.flatten(-2), torch.block_diag(*split(b, blocks)))


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
