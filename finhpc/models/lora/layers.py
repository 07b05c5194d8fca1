"""LoRA: y = W x + bias + scale B (A x), with W frozen and perhaps quantized (E. Hu et al., "LoRA", 2021)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finhpc.lowrank.layers import as_product, expand, latent_of
from finhpc.quantization.frozen import FrozenLinear


class LoraProduct(torch.autograd.Function):
    """The frozen product plus the adapter's, for x (rows, in), in x's dtype; without `base` only the adapter's.

    Stores x, which layers with the same input share, and the narrow A x. Computes no weight gradient of the base.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, base: FrozenLinear | None, scale: float) -> Tensor:
        narrow, wide = F.linear(x, a.to(x.dtype)), b.to(x.dtype)
        ctx.save_for_backward(x, narrow, a, b)
        ctx.base, ctx.scale = base, scale
        if base is None:
            return F.linear(narrow, wide).mul_(scale)
        return base.product(x).addmm_(narrow, wide.T, alpha=scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, narrow, a, b = ctx.saved_tensors
        grad = gradients[0]
        wide = b.to(grad.dtype)
        # With beta=0 the first argument only gives the shape: the scale is part of the products.
        d_b = torch.addmm(wide, grad.T, narrow, beta=0, alpha=ctx.scale).to(b.dtype)
        d_narrow = torch.addmm(narrow, grad, wide, beta=0, alpha=ctx.scale)
        d_a = (d_narrow.T @ x).to(a.dtype)
        d_x = None
        if ctx.needs_input_grad[0]:
            if ctx.base is None:
                d_x = d_narrow @ a.to(grad.dtype)
            else:
                d_x = (grad @ ctx.base.matrix(grad.dtype)).addmm_(d_narrow, a.to(grad.dtype))
        return d_x, d_a, d_b, None, None


class FrozenLowRankLinear(nn.Module):
    """A frozen `LowRankLinear`: both factors are frozen and perhaps quantized."""

    def __init__(self, a: FrozenLinear, b: FrozenLinear, between: Callable[[Tensor], Tensor], blocks: int = 1) -> None:
        super().__init__()
        self.A, self.B, self.between, self.blocks = a, b, between, blocks
        self.in_features, self.out_features = a.in_features, b.out_features

    def forward(self, x: Tensor) -> Tensor:
        return expand(self.B, latent_of(self.A(x), self.between, self.blocks), self.blocks)

    def as_product(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return z and Z as `LowRankLinear.as_product`."""
        return as_product(latent_of(self.A(x), self.between, self.blocks), self.B.matrix(x.dtype), self.blocks)


class LoraLinear(nn.Module):
    """`base` with a trained adapter in float32: A (rank, in), B (out, rank); maps (..., in) to (..., out)."""

    casts_parameters = True  # to the type of its inputs

    def __init__(
        self, base: FrozenLinear | FrozenLowRankLinear, a: Tensor, b: Tensor, scale: float, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.base, self.scale, self.dropout = base, scale, dropout
        self.A, self.B = nn.Parameter(a), nn.Parameter(b)

    def forward(self, x: Tensor) -> Tensor:
        drops = bool(self.dropout) and self.training
        rows = x.reshape(-1, x.shape[-1])
        if isinstance(self.base, FrozenLinear) and not drops:
            out = self._product(rows, self.base)
        else:
            out = self.base(rows) + self._product(F.dropout(rows, self.dropout) if drops else rows, None)
        return out.view(*x.shape[:-1], -1)

    def as_product(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return z and Z as `LowRankLinear.as_product`: those of the base, next to the adapter's."""
        frozen, matrix = self.base.as_product(x)
        dropped = F.dropout(x, self.dropout, self.training)
        narrow = self.scale * F.linear(dropped, self.A.to(x.dtype))
        return torch.cat((frozen, narrow), -1), torch.cat((matrix, self.B.to(x.dtype)), 1)

    def _product(self, rows: Tensor, base: FrozenLinear | None) -> Tensor:
        return LoraProduct.apply(rows, self.A, self.B, base, self.scale)  # type: ignore[no-untyped-call, no-any-return]

    def pair(self) -> tuple[Tensor, Tensor]:
        """Return A (rank, in_features) and B (out_features, rank)."""
        return self.A, self.B
