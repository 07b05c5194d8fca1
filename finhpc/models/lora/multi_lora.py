"""Several LoRA adapters over one base in memory; every row of a batch goes through its own.

B. Chen et al., "Punica", 2023, gather A and B of each row in a kernel; here they are gathered once for a
batch, and a layer is one product with the base and two batched ones.
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

    Ranks below the largest are filled up with zeros. Maps (batch, ..., in) to (batch, ..., out).
    """

    A: Tensor
    B: Tensor

    def __init__(
        self, base: nn.Module, pairs: Sequence[tuple[Tensor, Tensor, float] | None], dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.base = base
        held = [pair for pair in pairs if pair is not None]
        rank = max(len(a) for a, _, _ in held)
        a_all = torch.zeros(len(pairs) + 1, rank, held[0][0].shape[1])
        b_all = torch.zeros(len(pairs) + 1, held[0][1].shape[0], rank)
        for i, pair in enumerate(pairs):
            if pair is not None:
                a, b, scale = pair
                a_all[i, : len(a)], b_all[i, :, : len(a)] = a, scale * b.float()
        self.register_buffer("A", a_all.to(dtype))
        self.register_buffer("B", b_all.to(dtype))
        self.chosen: tuple[Tensor, Tensor] | None = None

    def choose(self, rows: list[int]) -> None:
        """Adapter's number of each row of the batches that follow."""
        if set(rows) == {len(self.A) - 1}:
            self.chosen = None
        elif len(set(rows)) == 1:
            self.chosen = self.A[rows[0]], self.B[rows[0]]
        else:
            index = torch.tensor(rows, device=self.A.device)
            whole = rows == list(range(len(rows)))
            a, b = (x[: len(rows)] if whole else x[index] for x in (self.A, self.B))
            self.chosen = a.transpose(1, 2), b.transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x)
        if self.chosen is None:
            return out
        a, b = self.chosen
        if a.dim() == 2:
            return out + F.linear(F.linear(x, a), b)
        narrow = torch.bmm(x.reshape(len(x), -1, x.shape[-1]), a)
        return torch.baddbmm(out.reshape(len(x), -1, out.shape[-1]), narrow, b).view(out.shape)


class Adapters:
    """The adapters of a model, by name. `names`: in the order of their numbers."""

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

    def choose(self, names: Sequence[str | None]) -> None:
        """The adapter of each row of the next batch; None: the base alone."""
        rows = [len(self.names) if name is None else self.names.index(name) for name in names]
        for layer in self.layers:
            layer.choose(rows)

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for layer in self.layers for x in (layer.A, layer.B))


def attach(model: Any, adapters: Mapping[str, Adapter]) -> Adapters:
    """Put adapters into a model in memory, whose base is first rounded as `round_for` says."""
    round_for(model, adapters)
    return Adapters(model, adapters)


def round_for(model: Any, adapters: Mapping[str, Adapter]) -> None:
    """Round a model's weights as they were when its adapters were trained, all at the same bits.

    A model that is quantized already stays as it is.
    """
    if not quantizer_of(model.config):
        for bits, scheme in {(adapter.bits, adapter.scheme) for adapter in adapters.values()}:
            round_base(model, bits, scheme)
