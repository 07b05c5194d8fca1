"""The parts of a model over packed examples: the modules and names of `parts_of`, see `finhpc.models.packing.layout`.

Only rows that predict a token go through the MLP of the last block, the last norm and the head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from finhpc.models.families import flow
from finhpc.models.families.family import HALVES, Flow, PackedAttention, Part
from finhpc.models.families.registry import family_of
from finhpc.models.loss import cross_entropy
from finhpc.models.packing.layout import POSITION, TOKEN, layout_of
from finhpc.models.recompute import whole_blocks
from finhpc.settings.training import Recompute


def packed_parts(config: Any, recompute: Recompute = "none") -> list[Part]:
    """Return `parts_of` over packs: flows are (hidden (1, rows, width), pack), the first part takes a pack.

    Every token sees all tokens before it: no example may be longer than a model's sliding window.
    """
    family = family_of(config)
    attended, row = family.packed_attention(config), family.parts(config)
    last = max(i for i, part in enumerate(row) if part.kind == HALVES[0])
    runs: dict[str, Callable[..., Any]] = {
        "embedding": lambda pack, module: (module(pack[:, TOKEN]), pack),
        "positions": lambda data, module: (data[0] + module(data[1][:, POSITION]), data[1]),
        "dropout": lambda data, module: data,  # a frozen base uses none: a prefix that examples share has one value
        "mlp": flow.mlp,
        "norm": flow.apply,
        "head": head,
    }
    packed = []
    for i, part in enumerate(row):
        run = runs.get(part.kind)
        if part.kind == HALVES[0]:
            run = partial(attention, attended, family.output_projection, recompute == "none", i == last)
        assert run is not None
        packed.append(Part(part.names, part.kind, run))
    return whole_blocks(packed) if recompute == "full" else packed


def without_dropout(config: Any) -> None:
    """Set every dropout of a config to 0: a frozen base uses none; its adapters may."""
    for key in ("attn_pdrop", "resid_pdrop", "embd_pdrop", "attention_dropout"):
        if getattr(config, key, 0):
            setattr(config, key, 0.0)


def attention(
    attended: PackedAttention, projection: str, keep: bool, last: bool, data: Flow, norm: nn.Module, module: nn.Module
) -> Flow:
    """Run the attention half of a block; the last block returns only rows that predict a token (at least one)."""
    hidden, pack = data
    out = attended(module, norm(hidden), pack, keep)
    if last:
        rows = layout_of(pack).predicting
        hidden, out = hidden[:, rows], out[:, rows]
    return hidden + module.get_submodule(projection)(out), pack


def head(data: Flow, module: nn.Module) -> Tensor:
    """Return the pack's share of the mean cross-entropy over all targets, in nats, times the number of packs.

    See `PACKS`. A pack without targets has one row and loss 0.
    """
    hidden, pack = data
    layout, logits = layout_of(pack), flow.logits(hidden[0], module)
    if len(layout.wanted) == 0:
        return logits.sum().float() * 0.0
    return cross_entropy(logits, layout.wanted) * (len(layout.wanted) * layout.scale)
