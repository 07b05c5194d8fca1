"""LoRA: y = W x + bias + scale B (A x), with W frozen and perhaps quantized (E. Hu et al., "LoRA", 2021).

DoRA trains a magnitude m (out,) besides A and B: y = g * ((W + scale B A) x) + bias, with g = m / lengths of the rows
of W + scale B A, which count as constants in the backward pass (S.-Y. Liu et al., "DoRA: Weight-Decomposed Low-Rank
Adaptation", 2024, equation 5 and section 4.3).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finhpc.lowrank.layers import as_product, expand, latent_of
from finhpc.quantization.frozen import FrozenLinear

ROWS = 256  # of a matrix in float32 at a time, to find their lengths


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


class Gain(torch.autograd.Function):
    """g * h + bias for h (rows, out), in h's dtype; g (out,) is float32, because its steps are small next to 1."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(h, gain)
        return (h * gain if bias is None else torch.addcmul(bias.float(), h.float(), gain)).to(h.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        h, gain = ctx.saved_tensors
        grad = gradients[0]
        return (grad * gain).to(h.dtype), torch.linalg.vecdot(grad.float(), h.float(), dim=0), None


class Scaled(torch.autograd.Function):
    """A weight times constants; unlike torch's product its backward pass may run once for each micro-batch."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, constants: Tensor) -> Tensor:
        ctx.constants = constants
        return weight * constants

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0] * ctx.constants, None


@torch.no_grad()
def row_lengths(rows: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return the lengths (out,) of the rows of W + scale B A in float32, without the sum; `rows`: W (out, in).

    The memory is that of `ROWS` rows in float32.
    """
    a, b = a.float(), scale * b.float()
    squares = (b @ (a @ a.T) * b).sum(1)
    for part, of_b, found in zip(rows.split(ROWS), b.split(ROWS), squares.split(ROWS), strict=True):
        wide = part.float()
        found += torch.linalg.vector_norm(wide, dim=1).square_() + 2 * (wide @ a.T * of_b).sum(1)
    return squares.clamp_(min=0).sqrt_()


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

    casts_parameters = True  # A and B, to the type of its inputs

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


class DoraLinear(LoraLinear):
    """`LoraLinear` of a dense `base` with a trained `magnitude` (out,): the lengths of the rows of W + scale B A.

    `dtype`: of the matrix that products with `base` are computed with.
    """

    def __init__(
        self,
        base: FrozenLinear,
        a: Tensor,
        b: Tensor,
        scale: float,
        dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(base, a, b, scale, dropout)
        self.dtype = dtype
        self.register_buffer("bias", base.bias, persistent=False)
        self.bias: Tensor | None
        base.bias = None  # the gain does not apply to it
        self.magnitude = nn.Parameter(self._lengths())

    def derive(self, name: str, weight: Tensor) -> Tensor | None:
        """Return g in place of the magnitude, see `DerivedWeights`."""
        if name != "magnitude":
            return None
        return Scaled.apply(weight, 1 / self._lengths())  # type: ignore[no-untyped-call, no-any-return]

    def _lengths(self) -> Tensor:
        assert isinstance(self.base, FrozenLinear)
        return row_lengths(self.base.matrix(self.dtype), self._parameters["A"], self._parameters["B"], self.scale)  # type: ignore[arg-type]

    @property
    def _gain(self) -> Tensor:
        """g: made once for all passes of a step, or now."""
        made: Tensor | None = self.magnitude
        if isinstance(made, nn.Parameter):
            made = self.derive("magnitude", made)
        assert made is not None
        return made

    def forward(self, x: Tensor) -> Tensor:
        rows, gain, base = x.reshape(-1, x.shape[-1]), self._gain, self.base
        assert isinstance(base, FrozenLinear)
        if self.dropout and self.training:  # the base sees all of x, and g - 1 times the rest of it (as peft)
            dropped = F.dropout(rows, self.dropout)
            frozen: Tensor = base(dropped)
            out: Tensor = base(rows) - frozen + self._scaled(frozen + self._product(dropped, None), gain)
        else:
            out = self._scaled(self._product(rows, base), gain)
        return out.view(*x.shape[:-1], -1)

    def _scaled(self, h: Tensor, gain: Tensor) -> Tensor:
        return Gain.apply(h, gain, self.bias)  # type: ignore[no-untyped-call, no-any-return]

    def as_product(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gain, (_, matrix) = self._gain[:, None], self.base.as_product(x)
        dropped = F.dropout(x, self.dropout, self.training)
        narrow = self.scale * F.linear(dropped, self.A.to(x.dtype))
        wide = (gain * self.B).to(x.dtype)
        if not (self.dropout and self.training):
            return torch.cat((x, narrow), -1), torch.cat(((gain * matrix).to(x.dtype), wide), 1)
        rest = ((gain - 1) * matrix).to(x.dtype)
        return torch.cat((x, dropped, narrow), -1), torch.cat((matrix, rest, wide), 1)
