"""Several LoRA adapters over one base in memory; every row of a batch goes through its own.

B. Chen et al., "Punica", 2023, gather A and B of each row in a kernel; here they are gathered once for a
batch, and a layer is one product with the base and two batched ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finhpc.errors import ConfigError
from finhpc.models.adapter import Adapter, check_base, load_adapter
from finhpc.models.families import skeleton


class AdaptedLinear(nn.Module):
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
        self.layers: list[AdaptedLinear] = []
        for name in sorted({name for adapter in adapters.values() for name in adapter.pairs}):
            pairs = [
                (*adapter.pairs[name], adapter.scale) if name in adapter.pairs else None
                for adapter in adapters.values()
            ]
            layer = AdaptedLinear(model.get_submodule(name), pairs, model.dtype).to(model.device)
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


def named(entry: str) -> tuple[str, Path]:
    """Name and folder of an entry of `adapters`: NAME=FOLDER, or FOLDER, named by its last part."""
    name, equals, rest = entry.partition("=")
    path = Path(rest if equals else entry).expanduser()
    return (name if equals else path.name), path


def read_adapters(given: Sequence[str], config: Any, folder: Path) -> dict[str, Adapter]:
    """NAME=FOLDER (or FOLDER, named by its last part) -> adapters that fit the model in `folder`, of that `config`.

    Raises `ConfigError` with every one that cannot be used, `CheckpointError` where a file is damaged.
    """
    config = deepcopy(config)
    if getattr(config, "factor_modules", False):  # an adapter names whole layers
        config.factor_modules = False
    base = skeleton(config)
    found: dict[str, Adapter] = {}
    problems: list[str] = []
    for entry in given:
        name, path = named(entry)
        if name in found:
            problems.append(f"adapters names {name} twice; give each a name of its own, as NAME=FOLDER.")
            continue
        try:
            found[name] = load_adapter(path, base)
            check_base(path, folder)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return found
