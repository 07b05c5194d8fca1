"""Several LoRA adapters on one base in memory; each row of a batch uses its own.

B. Chen et al., "Punica", 2023, gather A and B of each row in a kernel; here they are gathered once per batch, and a
layer is one product with the base and two batched ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finhpc.models.files.config import quantizer_of
from finhpc.models.lora.layers import row_lengths
from finhpc.models.lora.peft_format import Adapter, round_base

COLUMNS = 1024  # of a base's matrix that are read at a time


class Pair(NamedTuple):
    """An adapter of one layer, see `Adapter`; `magnitude`: DoRA's."""

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None


class MultiLoraLinear(nn.Module):
    """`base` and N adapters: A (N + 1, rank, in), B (N + 1, out, rank), scaled; the last of them adds nothing.

    Ranks below the largest are padded with zeros. Maps (batch, ..., in) to (batch, ..., out). `gains`: if some adapter
    is a DoRA, g (N + 1, out) of `finhpc.models.lora.layers`, 1 for the others.
    """

    A: Tensor
    B: Tensor
    gains: Tensor | None

    def __init__(self, base: nn.Module, pairs: Sequence[Pair | None], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.base = base
        present = [pair for pair in pairs if pair is not None]
        rank = max(len(pair.a) for pair in present)
        a_all = torch.zeros(len(pairs) + 1, rank, present[0].a.shape[1])
        b_all = torch.zeros(len(pairs) + 1, present[0].b.shape[0], rank)
        gains = torch.ones(len(pairs) + 1, b_all.shape[1], device=device)
        doras = any(pair.magnitude is not None for pair in present)
        rows = _rows(base, a_all.shape[2], dtype, device) if doras else None
        for i, pair in enumerate(pairs):
            if pair is not None:
                a_all[i, : len(pair.a)], b_all[i, :, : len(pair.a)] = pair.a, pair.scale * pair.b.float()
            if pair is not None and pair.magnitude is not None:
                assert rows is not None
                lengths = row_lengths(rows, pair.a.to(device), pair.b.to(device), pair.scale)
                gains[i] = pair.magnitude.to(device) / lengths
        self.register_buffer("A", a_all.to(device, dtype))
        self.register_buffer("B", b_all.to(device, dtype))
        self.register_buffer("gains", gains if doras else None)
        self.selected: tuple[Tensor, Tensor] | None = None
        self.gain: Tensor | None = None

    def select(self, rows: list[int]) -> None:
        """Set the adapter's number of each row of the batches that follow."""
        if self.gains is not None:
            numbers = rows[:1] if len(set(rows)) == 1 else rows
            self.gain = self.gains[torch.tensor(numbers, device=self.gains.device)][:, None]
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
            out = out + F.linear(F.linear(x, a), b)
        else:
            narrow = torch.bmm(x.reshape(len(x), -1, x.shape[-1]), a)
            out = torch.baddbmm(out.reshape(len(x), -1, out.shape[-1]), narrow, b).view(out.shape)
        return out if self.gain is None else self._scaled(out)

    def _scaled(self, out: Tensor) -> Tensor:
        """Return g * (out - bias) + bias, in out's dtype."""
        assert self.gain is not None
        bias: Tensor | None = getattr(self.base, "bias", None)
        rows = out.reshape(len(out), -1, out.shape[-1]).float()
        shift = rows.new_zeros(()) if bias is None else bias.float()
        return torch.addcmul(shift, rows - shift, self.gain).to(out.dtype).view(out.shape)


@torch.no_grad()
def _rows(base: nn.Module, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return W (out, in) of a layer that stores its weights in any way, in float32: what it makes of unit vectors."""
    bias: Tensor | None = getattr(base, "bias", None)
    shift = 0.0 if bias is None else bias.float()
    made = []
    for begin in range(0, columns, COLUMNS):
        units = torch.zeros(min(COLUMNS, columns - begin), columns, dtype=dtype, device=device)
        units.diagonal(begin).fill_(1)
        made.append(base(units).float() - shift)
    return torch.cat(made).T


class Adapters:
    """The adapters attached to a model. `names`: in the order of their numbers."""

    def __init__(self, model: Any, adapters: Mapping[str, Adapter]) -> None:
        self.names = list(adapters)
        self.layers: list[MultiLoraLinear] = []
        for name in sorted({name for adapter in adapters.values() for name in adapter.pairs}):
            pairs = [
                Pair(*adapter.pairs[name], adapter.scales[name], adapter.magnitudes.get(name))
                if name in adapter.pairs
                else None
                for adapter in adapters.values()
            ]
            layer = MultiLoraLinear(model.get_submodule(name), pairs, model.dtype, model.device)
            model.set_submodule(name, layer)
            self.layers.append(layer)

    def select(self, names: Sequence[str | None]) -> None:
        """Set the adapter of each row of the next batch; None: only the base."""
        rows = [len(self.names) if name is None else self.names.index(name) for name in names]
        for layer in self.layers:
            layer.select(rows)

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for layer in self.layers for tensor in layer.buffers(recurse=False))


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
