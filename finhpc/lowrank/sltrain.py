"""SLTrain: a low-rank pair plus a sparse matrix, W = (lora_alpha / rank) B A + S.

A. Han et al., "SLTrain: a sparse plus low-rank approach for parameter and memory efficient pretraining", NeurIPS 2024
(arXiv 2406.02214, section 3; code andyjm3/SLTrain, `splora_linear.py`, `sparse_linear.cpp`). S has entries at a share
of its places (`method.sparse_share`) that are drawn once at random and never change; only the entries are trained.

As in the authors' code, W is made for every product, once more in the backward pass so that it is not stored, and the
gradients of A, B and S are taken from that of W. So a layer costs the multiplications of a dense one, and 4 rank in out
more per micro-batch: SLTrain saves parameters and optimizer state, and no time. Two narrow products and a sparse one
would be fewer multiplications, but torch has sparse products of float32 alone on CPUs, too slow to save any time.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finhpc.lowrank.layers import LowRankLinear


class SparseLinear(LowRankLinear):
    """y = W x + bias, W = (lora_alpha / rank) B A + S; other shapes as `LowRankLinear`.

    `S`: the entries of the sparse matrix. `support`: their places in W.flatten(), int32, in order. The support follows
    from `seed`, the `name` of the layer and its shape, so that no file contains it; a layer that was built on the meta
    device has none until `set_support`.
    """

    support: Tensor
    init = "sltrain"
    casts_parameters = True  # S, to the type of its inputs, under autocast

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool,
        blocks: int = 1,
        name: str = "",
        share: float = 0.03,
        lora_alpha: float = 32.0,
        seed: int = 0,
    ) -> None:
        super().__init__(in_features, out_features, rank, bias, blocks)
        self.scale, self.drawn_from = lora_alpha / rank, f"{seed}:{name}"
        count = max(1, int(share * in_features * out_features))
        self.S = nn.Parameter(torch.empty(count))
        self.register_buffer("support", torch.empty(count, dtype=torch.int32), persistent=False)
        self.set_support()

    def places(self) -> Tensor:
        """Draw the support: each set of places is as likely as any other.

        NumPy keeps the numbers of a bit generator the same in all versions (NEP 19).
        """
        key = int.from_bytes(hashlib.sha256(self.drawn_from.encode()).digest()[:16], "little")
        bits, size = np.random.Philox(key=key), np.uint64(self.in_features * self.out_features)
        chosen = np.empty(0, np.uint64)
        while missing := len(self.S) - len(chosen):
            chosen = np.union1d(chosen, bits.random_raw(missing) % size)
        return torch.from_numpy(chosen.astype(np.int32))

    def set_support(self) -> None:
        """Fill `support`, once it has memory."""
        if not self.support.is_meta:
            self.support.copy_(self.places())

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        a, b, s = (tensor.to(dtype) for tensor in (self.A.weight, self.B.weight, self.S))
        bias = None if self.B.bias is None else self.B.bias.to(dtype)
        y: Tensor = _Product.apply(x.to(dtype), *self.in_blocks(a, b), s, bias, self.support, self.scale)  # type: ignore[no-untyped-call]
        return y

    def as_product(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, self.product(self.A.weight, self.B.weight, self.S)

    def product(self, a: Tensor, b: Tensor, s: Tensor | None = None) -> Tensor:
        """Return W of tensors of the shapes of `A.weight`, `B.weight` and `S`."""
        assert s is not None
        support = self.places().to(a.device) if self.support.is_meta else self.support
        return _matrix(*self.in_blocks(a, b), s, support, self.scale)


def _matrix(a: Tensor, b: Tensor, s: Tensor, support: Tensor, scale: float) -> Tensor:
    """Return W (out_features, in_features); A and B as from `LowRankLinear.in_blocks`."""
    w = (scale * b @ a).flatten()
    return w.index_add(0, support, s).view(-1, a.shape[-1])


class _Product(torch.autograd.Function):
    """x W^T + bias, of which W is not stored."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, s: Tensor, bias: Tensor | None, support: Tensor, scale: float
    ) -> Tensor:
        ctx.save_for_backward(x, a, b, s, support)
        ctx.scale = scale
        return F.linear(x, _matrix(a, b, s, support, scale), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, a, b, s, support = ctx.saved_tensors
        grad, scale = gradients[0], ctx.scale
        d_x = grad @ _matrix(a, b, s, support, scale) if ctx.needs_input_grad[0] else None
        rows = grad.flatten(0, -2)
        d_w = rows.T @ x.flatten(0, -2)
        d_s = d_w.flatten().index_select(0, support)
        blocks = d_w.view(*b.shape[:-1], -1)
        d_a, d_b = (scale * b).mT @ blocks, blocks @ (scale * a).mT
        d_bias = rows.sum(0) if ctx.needs_input_grad[4] else None
        return d_x, d_a, d_b, d_s, d_bias, None, None


def set_supports(model: nn.Module) -> None:
    """Fill the support of every SLTrain layer of a model that has just got its memory."""
    for module in model.modules():
        if isinstance(module, SparseLinear):
            module.set_support()


def multiplied(model: nn.Module) -> int:
    """Return how many weights a token is multiplied by: those of all matrices, SLTrain's W in place of A and B."""
    sparse = [module for module in model.modules() if isinstance(module, SparseLinear)]
    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 2)
    pairs = sum(layer.A.weight.numel() + layer.B.weight.numel() for layer in sparse)
    return matrices - pairs + sum(layer.in_features * layer.out_features for layer in sparse)
