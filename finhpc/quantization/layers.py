"""Layers that hold their matrix packed, in 8 or 4 bits a weight, and unpack it each time they are used.

What stays in memory is the packed matrix; a forward pass makes the float one of a single layer and
lets it go. The low-rank layers become these too, one for A and one for B, see `replace`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from finhpc.quantization.per_vector import Vectors, dequantize, pack, packed_columns, quantize, unpack


class QuantizedMatrix(nn.Module):
    """A matrix (rows, columns) quantised by rows.

    `weight`: uint8 (rows, `packed_columns(columns, bits)`, 1), a buffer like the others, as nothing here
    is trained. Its third dimension is there for programs that know nothing of the scheme: transformers only warns of
    an unknown one, and would take codes of a matrix's own shape for weights.
    `scale`, `zero`: float32 (rows,), whatever type the model is cast to.
    """

    weight: Tensor
    scale: Tensor
    zero: Tensor
    like: Tensor

    def __init__(self, rows: int, columns: int, bits: int) -> None:
        super().__init__()
        self.rows, self.columns, self.bits = rows, columns, bits
        self.register_buffer("weight", torch.empty(rows, packed_columns(columns, bits), 1, dtype=torch.uint8))
        self.register_buffer("scale", torch.empty(rows, dtype=torch.float32))
        self.register_buffer("zero", torch.empty(rows, dtype=torch.float32))
        self.register_buffer("like", torch.empty(0), persistent=False)  # cast with the model, to know its type

    @property
    def packed(self) -> Tensor:
        """The codes as `finhpc.quantization.per_vector.pack` gives them, (rows, packed columns)."""
        return self.weight.squeeze(-1)

    def dequantized(self) -> Tensor:
        """The float32 matrix (rows, columns) that is computed with."""
        return dequantize(Vectors(unpack(self.packed, self.bits, self.columns), self.scale, self.zero))

    def extra_repr(self) -> str:
        return f"rows={self.rows}, columns={self.columns}, bits={self.bits}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        scale, zero = self.scale, self.zero
        super()._apply(fn, recurse)
        if not scale.is_meta:  # in 16 bits the scale alone would be off by more than the codes are
            self.scale, self.zero = scale.to(self.scale.device), zero.to(self.zero.device)
        return self


class QuantizedLinear(QuantizedMatrix):
    """y = W x + bias with W (out_features, in_features) packed; maps (..., in_features) to (..., out_features)."""

    def __init__(self, in_features: int, out_features: int, bits: int, bias: bool) -> None:
        super().__init__(out_features, in_features, bits)
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantized().to(x.dtype), self.bias)


class QuantizedEmbedding(QuantizedMatrix):
    """The packed row of each token, unpacked; maps int64 (...) to (..., dim)."""

    def __init__(self, num_embeddings: int, dim: int, bits: int) -> None:
        super().__init__(num_embeddings, dim, bits)
        self.num_embeddings, self.embedding_dim = num_embeddings, dim

    def forward(self, tokens: Tensor) -> Tensor:
        codes = unpack(self.packed[tokens], self.bits, self.columns)
        return dequantize(Vectors(codes, self.scale[tokens], self.zero[tokens])).to(self.like.dtype)


class TiedHead(nn.Module):
    """The output layer whose matrix is the packed embedding; maps (..., dim) to (..., num_embeddings)."""

    def __init__(self, embedding: QuantizedEmbedding) -> None:
        super().__init__()
        self.embedding = (embedding,)  # in a tuple, so that its tensors are the embedding's alone

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.embedding[0].dequantized().to(x.dtype))


def minmax_tensors(matrix: Tensor, bits: int, name: str) -> dict[str, Tensor]:
    """What a `QuantizedMatrix` holds of `matrix` (rows, columns), by the names of its buffers."""
    codes, scale, zero = quantize(matrix, bits, name)
    return {"weight": pack(codes, bits).unsqueeze(-1), "scale": scale, "zero": zero}


def replace(model: nn.Module, bits: int) -> None:
    """Put an empty packed layer in the place of every linear layer and embedding of `model`, on its device.

    Low-rank layers must have their factors as modules, see `finhpc.lowrank.layers.FactorLinear`.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, (nn.Linear, Conv1D, nn.Embedding)):
            model.set_submodule(name, _twin(module, bits))


def _twin(module: nn.Linear | Conv1D | nn.Embedding, bits: int) -> QuantizedMatrix:
    with module.weight.device:
        if isinstance(module, nn.Embedding):
            return QuantizedEmbedding(module.num_embeddings, module.embedding_dim, bits)
        if isinstance(module, Conv1D):  # stores (in, out)
            in_features, out_features = module.weight.shape
            return QuantizedLinear(in_features, out_features, bits, bias=True)
        return QuantizedLinear(module.in_features, module.out_features, bits, bias=module.bias is not None)
