"""The parts of a model over packed examples: the modules and names of `parts_of`, see `finhpc.models.packing.layout`.

Only rows that predict a token go through the MLP of the last block, the last norm and the head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finhpc.models.families import parts
from finhpc.models.families.family import Family, Heads
from finhpc.models.families.parts import HALVES, Compiled, Flow, Part, as_it_is
from finhpc.models.families.registry import family_of
from finhpc.models.loss import head_loss
from finhpc.models.packing.attention import attend_segments
from finhpc.models.packing.layout import POSITION, TOKEN, layout_of
from finhpc.models.recompute import whole_blocks
from finhpc.settings.training import Recompute


def packed_parts(config: Any, recompute: Recompute = "none", compiled: Compiled = as_it_is) -> list[Part]:
    """Return `parts_of` over packs: flows are (hidden (1, rows, width), pack), the first part takes a pack.

    Every token sees all tokens before it: no example may be longer than a model's sliding window.
    """
    queries, projected, mlp = (compiled(function) for function in (heads_of, add_projected, parts.mlp))
    family = family_of(config)
    row = family.parts(config)
    last = max(i for i, part in enumerate(row) if part.kind == HALVES[0])
    runs: dict[str, Callable[..., Any]] = {
        "embedding": lambda pack, module: (module(pack[:, TOKEN]), pack),
        "positions": lambda data, module: (data[0] + module(data[1][:, POSITION]), data[1]),
        "dropout": lambda data, module: data,  # a frozen base uses none: a prefix that examples share has one value
        "mlp": lambda data, *modules: (mlp(data, *modules)[0], data[1]),
        "norm": parts.apply,
        "head": head,
    }
    packed = []
    for i, part in enumerate(row):
        run = runs.get(part.kind)
        if part.kind == HALVES[0]:
            run = Attention(family, config, recompute == "none", i == last, queries, projected)
        assert run is not None
        packed.append(Part(part.names, part.kind, run))
    return whole_blocks(packed) if recompute == "full" else packed


def without_dropout(config: Any) -> None:
    """Set every dropout of a config to 0: a frozen base uses none; its adapters may."""
    for key in ("attn_pdrop", "resid_pdrop", "embd_pdrop", "attention_dropout"):
        if getattr(config, key, 0):
            setattr(config, key, 0.0)


@dataclass(frozen=True)
class Attention:
    """The attention half of a block; the last block returns only rows that predict a token (at least one).

    `queries` and `projected` do what does not depend on a pack's layout and can be compiled. Without `keep` no
    probabilities are stored for the backward pass.
    """

    family: Family
    config: Any
    keep: bool
    last: bool
    queries: Callable[..., Heads]
    projected: Callable[..., Tensor]

    def __call__(self, data: Flow, norm: nn.Module, module: Any) -> Flow:
        hidden, pack = data
        layout = layout_of(pack)
        rotated = _rotated(self.family, self.config, hidden, pack)
        q, k, v = self.queries(self.family, hidden, norm, module, rotated)
        out = attend_segments(q, k, v, layout, module.scaling, self.keep).reshape(1, hidden.shape[1], -1)
        if self.last:
            rows = layout.predicting
            hidden, out = hidden[:, rows], out[:, rows]
        return self.projected(self.family, hidden, out, module), pack


def heads_of(family: Family, hidden: Tensor, norm: nn.Module, module: Any, rotated: Any) -> Heads:
    """Return queries, keys and values (rows, heads, size) of hidden (1, rows, width)."""
    q, k, v = family.heads(module, norm(hidden), rotated)
    return q.squeeze(0), k.squeeze(0), v.squeeze(0)  # an index would cost a fill and a copy in the backward pass


def add_projected(family: Family, hidden: Tensor, out: Tensor, module: Any) -> Tensor:
    """Return hidden plus the projected output of attention, both (1, rows, width)."""
    return hidden + module.get_submodule(family.output_projection)(out)  # type: ignore[no-any-return]


@torch.no_grad()
def _rotated(family: Family, config: Any, x: Tensor, pack: Tensor) -> Any:
    """Return cos and sin (1, T, size) of every token's position, computed once per pack and stage."""
    layout, key = layout_of(pack), ("rotary", id(config), x.dtype)
    if key not in layout.cache:
        rotary = family.rotary(config)
        if rotary is not None and x.is_cuda:  # moved without waiting for the GPU
            rotary._apply(Tensor.pin_memory).to(x.device, non_blocking=True)
        rotated = None if rotary is None else rotary.to(x.device)(x, pack[:, POSITION])
        layout.cache[key] = rotated, config  # as long as the config lives, no other one gets its id
    return layout.cache[key][0]


def head(data: Flow, module: nn.Module) -> Tensor:
    """Return the pack's share of the mean cross-entropy over all targets, in nats, times the number of packs.

    See `PACKS`. A pack without targets has one row and loss 0.
    """
    hidden, pack = data
    layout = layout_of(pack)
    if len(layout.wanted) == 0:
        return hidden.sum().float() * 0.0
    return head_loss(hidden.squeeze(0), module, layout.wanted) * (len(layout.wanted) * layout.scale)
