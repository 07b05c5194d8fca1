"""Several LoRA adapters on one base in memory; each row of a batch uses its own.

B. Chen et al., "Punica", 2023, gather A and B of each row in a kernel; here they are gathered once per batch, and a
layer is one product with the base and two batched ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finhpc.models.files.config import quantizer_of
from finhpc.models.lora.peft_format import Adapter, round_base


class MultiLoraLinear(nn.Module):
    """`base` and N adapters: A (N + 1, rank, in), B (N + 1, out, rank), scaled; the last of them adds nothing.

    Ranks below the largest are padded with zeros. Maps (batch, ..., in) to (batch, ..., out).
    """

    A: Tensor
    B: Tensor

    def __init__(
        self, base: nn.Module, pairs: Sequence[tuple[Tensor, Tensor, float] | None], dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.base = base
        present = [pair for pair in pairs if pair is not None]
        rank = max(len(a) for a, _, _ in present)
        a_all = torch.zeros(len(pairs) + 1, rank, present[0][0].shape[1])
        b_all = torch.zeros(len(pairs) + 1, present[0][1].shape[0], rank)
        for i, pair in enumerate(pairs):
            if pair is not None:
                a, b, scale = pair
                a_all[i, : len(a)], b_all[i, :, : len(a)] = a, scale * b.float()
        self.register_buffer("A", a_all.to(dtype))
        self.register_buffer("B", b_all.to(dtype))
        self.selected: tuple[Tensor, Tensor] | None = None

    def select(self, rows: list[int]) -> None:
        """Set the adapter's number of each row of the batches that follow."""
        if set(rows) == {len(self.A) - 1}:
            self.selected = None
        elif len(set(rows)) == 1:
            self.selected = self.A[rows[0]], self.B[rows[0]]
        else:
            index = torch.tensor(rows, device=self.A.device)
            in_order = rows == list(range(len(rows)))
            a, b = (x[: len(rows)] if in_order else x[index] for x in (self.A, self.B))
            self.selected = a.transpose(1, 2), b.transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x)
        if self.selected is None:
            return out
        a, b = self.selected
        if a.dim() == 2:
            return out + F.linear(F.linear(x, a), b)
        narrow = torch.bmm(x.reshape(len(x), -1, x.shape[-1]), a)
        return torch.baddbmm(out.reshape(len(x), -1, out.shape[-1]), narrow, b).view(out.shape)


class Adapters:
    """The adapters attached to a model. `names`: in the order of their numbers."""

    def __init__(self, model: Any, adapters: Mapping[str, Adapter]) -> None:
        self.names = list(adapters)
        self.layers: list[MultiLoraLinear] = []
        for name in sorted({name for adapter in adapters.values() for name in adapter.pairs}):
            pairs = [
                (*adapter.pairs[name], adapter.scales[name]) if name in adapter.pairs else None
                for adapter in adapters.values()
            ]
            layer = MultiLoraLinear(model.get_submodule(name), pairs, model.dtype).to(model.device)
            model.set_submodule(name, layer)
            self.layers.append(layer)

    def select(self, names: Sequence[str | None]) -> None:
        """Set the adapter of each row of the next batch; None: only the base."""
        rows = [len(self.names) if name is None else self.names.index(name) for name in names]
        for layer in self.layers:
            layer.select(rows)

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for layer in self.layers for tensor in (layer.A, layer.B))


def attach(model: Any, adapters: Mapping[str, Adapter]) -> Adapters:
    """Attach adapters to a model in memory, whose base is first rounded, see `round_for`."""
    round_for(model, adapters)
    return Adapters(model, adapters)


def round_for(model: Any, adapters: Mapping[str, Adapter]) -> None:
    """Round a model's weights as in the training of its adapters, all at the same bits.

    A quantized model is left as it is.
    """
    if not quantizer_of(model.config):
        for bits, scheme in {(adapter.bits, adapter.scheme) for adapter in adapters.values()}:
            round_base(model, bits, scheme)
