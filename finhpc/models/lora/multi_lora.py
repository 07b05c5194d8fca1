"""Several LoRA adapters on one base in memory; each token of a batch goes through its own.

L. Chen et al., "Punica", 2023, section 4, gather A and B of each row in a kernel. Here the rows of an adapter with many
of them are a product of their own, and all others go through the adapters side by side, as one of their ranks' sum:
every row through all A, then 0 in the place of other adapters', then through all B. These are more operations in fewer
and larger calls, and for few rows calls take the time. No weight is copied when the rows of a batch change, and the
places of 0 are computed once for all layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finhpc.errors import ConfigError
from finhpc.models.constant import filled, pack, product
from finhpc.models.files.config import quantizer_of
from finhpc.models.lora.layers import row_lengths
from finhpc.models.lora.peft_format import Adapter, round_base

COLUMNS = 1024  # of a base's matrix that are read at a time
MANY = 64  # rows for which an adapter gets a product of its own
FEW = 16  # adapters that are side by side whether all of them are needed or not
NONE = 0  # the number of the adapter that adds nothing


class Pair(NamedTuple):
    """An adapter of one layer, see `Adapter`; `magnitude`: DoRA's."""

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None


@dataclass
class Choice:
    """The adapter of every row of the next batch; all layers share one.

    `only`: that of all rows, otherwise `numbers`, one a row. `products`: adapters that get a product of their own, and
    their rows. The others are `members`, side by side, and `owners` is the place among them of each row's, -1 for rows
    of none. `damaged`: adapters that are never side by side, because 0 times NaN is NaN in the rows of all others.
    """

    only: int | None = NONE
    numbers: Tensor | None = None
    products: list[tuple[int, Tensor]] = field(default_factory=list)
    members: tuple[int, ...] = ()
    owners: Tensor | None = None
    damaged: set[int] = field(default_factory=set)
    _others: dict[int, Tensor] = field(default_factory=dict)

    def set(self, numbers: Sequence[int], slots: int, device: torch.device) -> None:
        """Choose an adapter below `slots` for each row."""
        rows: dict[int, list[int]] = {}
        for row, number in enumerate(numbers):
            rows.setdefault(number, []).append(row)
        self.only = numbers[0] if len(rows) == 1 else None
        if self.only is not None:
            return
        self.numbers = torch.tensor(numbers, device=device)
        rows.pop(NONE, None)
        alone = {n for n, of in rows.items() if len(of) >= MANY or n in self.damaged}
        self.products = [(n, torch.tensor(rows[n], device=device)) for n in sorted(alone)]
        few = rows.keys() - alone
        self.owners = None
        if not few:
            return
        most = max(FEW, 2 * len(few))  # computing for some more is cheaper than copying weights for others
        if slots - 1 - len(self.damaged) <= most:
            self.members = tuple(n for n in range(1, slots) if n not in self.damaged)
        elif len(self.members) > most or not few.issubset(self.members):
            self.members = tuple(sorted(few))
        places = {number: place for place, number in enumerate(self.members) if number in few}
        self.owners = torch.tensor([places.get(number, -1) for number in numbers], device=device)
        self._others.clear()

    def others(self, rank: int) -> Tensor:
        """Return where A x is another adapter's: bool (rows, members * rank)."""
        if rank not in self._others:
            assert self.owners is not None
            columns = torch.arange(len(self.members), device=self.owners.device).repeat_interleave(rank)
            self._others[rank] = self.owners[:, None] != columns
        return self._others[rank]


class MultiLoraLinear(nn.Module):
    """`base` and adapters by number: A (slots, rank, in), B (slots, out, rank), scaled; number 0 adds nothing.

    Ranks below the largest are padded with zeros. Maps (..., in) to (..., out), where rows of all leading dimensions
    are those of `choice`. `gains`: if some adapter is a DoRA, g (slots, out) of `finhpc.models.lora.layers`, 1 for the
    others.
    """

    A: Tensor
    B: Tensor
    gains: Tensor | None

    def __init__(self, base: nn.Module, like: Pair, choice: Choice, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.base, self.choice = base, choice
        self.register_buffer("A", torch.zeros(1, 0, like.a.shape[1], dtype=dtype, device=device))
        self.register_buffer("B", torch.zeros(1, like.b.shape[0], 0, dtype=dtype, device=device))
        self.register_buffer("gains", None)
        self.stacked: dict[bool, tuple[tuple[int, ...], Tensor, Tensor]] = {}  # whether of several adapters

    def reserve(self, slots: int, rank: int) -> None:
        """Make room for numbers below `slots` and for ranks up to `rank`."""
        self.stacked.clear()
        more, wider = max(0, slots - len(self.A)), max(0, rank - self.A.shape[1])
        if more or wider:
            self.A, self.B = F.pad(self.A, (0, 0, 0, wider, 0, more)), F.pad(self.B, (0, wider, 0, 0, 0, more))
        if more and self.gains is not None:
            self.gains = F.pad(self.gains, (0, 0, 0, more), value=1.0)

    @torch.no_grad()
    def put(self, number: int, pair: Pair | None) -> None:
        """Set an adapter, for whose number and rank there is room; None removes it."""
        self.stacked.clear()
        self.A[number], self.B[number] = 0, 0
        if self.gains is not None:
            self.gains[number] = 1
        if pair is None:
            return
        self.A[number, : len(pair.a)] = pair.a.to(self.A)
        self.B[number, :, : len(pair.a)] = (pair.scale * pair.b.float()).to(self.B)
        if pair.magnitude is not None:
            device = self.A.device
            if self.gains is None:
                self.gains = torch.ones(len(self.A), self.B.shape[1], device=device)
            rows = _rows(self.base, self.A.shape[2], self.A.dtype, device)
            lengths = row_lengths(rows, pair.a.to(device), pair.b.to(device), pair.scale)
            self.gains[number] = pair.magnitude.to(device) / lengths

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x)
        choice = self.choice
        if choice.only == NONE:
            return out
        if choice.only is not None:
            a, b = self._side_by_side((choice.only,))
            out = out + product(product(x, a), b)
            return out if self.gains is None else self._scaled(out, self.gains[choice.only])
        rows, sums = x.reshape(-1, x.shape[-1]), out.reshape(-1, out.shape[-1])
        for number, of in choice.products:
            own = F.pad(rows[of], (0, 0, 0, filled(len(of)) - len(of)))
            sums.index_add_(0, of, F.linear(F.linear(own, self.A[number]), self.B[number])[: len(of)])
        if choice.owners is not None:
            a, b = self._side_by_side(choice.members)
            narrow = product(rows, a).masked_fill_(choice.others(self.A.shape[1]), 0)
            sums += product(narrow, b)
        out = sums.view(out.shape)
        return out if self.gains is None else self._scaled(out, self.gains[choice.numbers])

    def _side_by_side(self, members: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return A (members * rank, in) and B (out, members * rank); copied if other members were needed before."""
        several = len(members) > 1
        if several not in self.stacked or self.stacked[several][0] != members:
            index = torch.tensor(members, device=self.A.device)
            a, b = self.A[index].flatten(0, 1), self.B[index].transpose(0, 1).flatten(1)
            self.stacked[several] = members, pack(a), pack(b)
        return self.stacked[several][1:]

    def _scaled(self, out: Tensor, gain: Tensor) -> Tensor:
        """Return g * (out - bias) + bias, in out's dtype."""
        bias: Tensor | None = getattr(self.base, "bias", None)
        rows = out.reshape(-1, out.shape[-1]).float()
        shift = rows.new_zeros(()) if bias is None else bias.float()
        return torch.addcmul(shift, rows - shift, gain).to(out.dtype).view(out.shape)


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
    """The adapters attached to a model, each with a number. `numbers`: of those that can be chosen by name."""

    def __init__(self, model: Any, adapters: Mapping[str, Adapter]) -> None:
        self.model, self.choice = model, Choice()
        self.numbers: dict[str, int] = {}
        self.layers: dict[str, MultiLoraLinear] = {}
        self.taken = {NONE}
        self.rounded = {(adapter.bits, adapter.scheme) for adapter in adapters.values()} or {(16, "")}
        self._reserve(len(adapters) + 1, adapters.values())
        for name, adapter in adapters.items():
            self.add(name, adapter)

    @property
    def names(self) -> list[str]:
        return list(self.numbers)

    def check(self, name: str, adapter: Adapter) -> None:
        """Raise `ConfigError` if the base is not rounded as in the training of an adapter."""
        if not quantizer_of(self.model.config) and (adapter.bits, adapter.scheme) not in self.rounded:
            own, bases = (
                " and ".join(map(_in_words, pairs)) for pairs in ([(adapter.bits, adapter.scheme)], self.rounded)
            )
            raise ConfigError(
                f"adapter {name} was trained with a base of {own}, but the one in memory has {bases}; open the "
                "model again with adapters of one kind."
            )

    def add(self, name: str, adapter: Adapter) -> int:
        """Attach an adapter; returns its number, the lowest that is free."""
        number = next(n for n in range(len(self.taken) + 1) if n not in self.taken)
        self._reserve(number + 1, [adapter])
        if not all(bool(x.isfinite().all()) for pair in adapter.pairs.values() for x in pair):
            self.choice.damaged.add(number)
        for layer_name, layer in self.layers.items():
            layer.put(number, _pair(adapter, layer_name))
        self.taken.add(number)
        self.numbers[name] = number
        return number

    def free(self, number: int) -> None:
        """Detach the adapter of that number, which nothing uses any more."""
        for layer in self.layers.values():
            layer.put(number, None)
        self.taken.discard(number)
        self.choice.damaged.discard(number)
        self.numbers = {name: other for name, other in self.numbers.items() if other != number}

    def _reserve(self, slots: int, adapters: Iterable[Adapter]) -> None:
        for adapter in adapters:
            for name in sorted(adapter.pairs):
                pair = _pair(adapter, name)
                assert pair is not None
                if name not in self.layers:
                    base = self.model.get_submodule(name)
                    layer = MultiLoraLinear(base, pair, self.choice, self.model.dtype, self.model.device)
                    self.model.set_submodule(name, layer)
                    self.layers[name] = layer
                self.layers[name].reserve(slots, len(pair.a))
        self.slots = max(slots, *(len(layer.A) for layer in self.layers.values()), 1)
        for layer in self.layers.values():
            layer.reserve(self.slots, 0)

    def select(self, names: Sequence[str | None], counts: Sequence[int] | None = None) -> None:
        """Set the adapter of each row of the next batch, or of so many rows in turn; None: only the base."""
        self.choose([NONE if name is None else self.numbers[name] for name in names], counts)

    def choose(self, numbers: Sequence[int], counts: Sequence[int] | None = None) -> None:
        """Set the adapters as `select` does, by their numbers."""
        if counts is not None and len(set(numbers)) > 1:
            numbers = [number for number, count in zip(numbers, counts, strict=True) for _ in range(count)]
        self.choice.set(numbers, self.slots, self.model.device)

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for layer in self.layers.values() for tensor in layer.buffers(recurse=False))


def _in_words(rounding: tuple[int, str]) -> str:
    """Return bits and scheme, such as "8 bits minmax"."""
    return f"{rounding[0]} bits {rounding[1]}".strip()


def _pair(adapter: Adapter, layer: str) -> Pair | None:
    """Return what an adapter has of a layer."""
    if layer not in adapter.pairs:
        return None
    return Pair(*adapter.pairs[layer], adapter.scales[layer], adapter.magnitudes.get(layer))


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
