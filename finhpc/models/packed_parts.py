"""The parts of a model over packed examples: the modules and names of `parts_of`, see `finhpc.models.packing.layout`.

Only rows that predict a token go through the MLP of the last block, the last norm and the head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from finhpc.models.attention import Attend, Scores
from finhpc.models.families import parts
from finhpc.models.families.family import DROPOUTS, Family, Heads
from finhpc.models.families.parts import HALVES, LAYER, Compiled, Ends, Flow, Part, as_it_is, rotate
from finhpc.models.families.registry import family_of
from finhpc.models.label_loss import candidate_scores, label_loss
from finhpc.models.loss import logits_product
from finhpc.models.packing.attention import attend_segments
from finhpc.models.packing.layout import POSITION, TOKEN, Layout, layout_of
from finhpc.models.recompute import whole_blocks
from finhpc.settings.training import Recompute


def packed_parts(config: Any, recompute: Recompute = "none", compiled: Compiled = as_it_is) -> list[Part]:
    """Return `parts_of` over packs: flows are (hidden (1, rows, width), pack), the first part takes a pack.

    Every token sees all tokens before it: no example may be longer than a model's sliding window.
    """
    queries, projected, mlp = (compiled(function) for function in (heads_of, add_projected, parts.mlp))
    family, ends, keep = family_of(config), Ends.of(config), recompute == "none"
    row = family.parts(config)
    last = max(i for i, part in enumerate(row) if part.kind in (HALVES[0], LAYER))
    runs: dict[str, Callable[..., Any]] = {
        "embedding": lambda pack, module: (ends.embed(module, pack[:, TOKEN]), pack),
        "positions": lambda data, module: (data[0] + module(data[1][:, POSITION]), data[1]),
        "dropout": lambda data, module: data,  # a frozen base uses none: a prefix that examples share has one value
        "mlp": lambda data, *modules: (mlp(data, *modules)[0], data[1]),
        "norm": parts.apply,
        "head": partial(head, ends=ends),
    }
    packed = []
    for i, part in enumerate(row):
        run = runs.get(part.kind)
        if part.kind == HALVES[0]:
            run = Attention(family, config, keep, i == last, queries, projected)
        elif part.kind == LAYER:
            run = Layer(family, config, keep, i == last, part.run.kind)  # type: ignore[attr-defined]
        assert run is not None
        packed.append(Part(part.names, part.kind, run))
    return whole_blocks(packed) if recompute == "full" else packed


def without_dropout(config: Any) -> None:
    """Set every dropout of a config to 0: a frozen base uses none; its adapters may."""
    for key in DROPOUTS:
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
        out = attend_segments(q, k, v, layout, Scores(module.scaling), self.keep).reshape(1, hidden.shape[1], -1)
        if self.last:
            rows = layout.predicting
            hidden, out = hidden[:, rows], out[:, rows]
        return self.projected(self.family, hidden, out, module), pack


@dataclass(frozen=True)
class Layer:
    """A decoder layer by its own `forward`; the last one returns only rows that predict a token (at least one).

    `kind`: that of its rotary positions. Without `keep` no probabilities are stored for the backward pass.
    """

    family: Family
    config: Any
    keep: bool
    last: bool
    kind: str | None

    def __call__(self, data: Flow, layer: nn.Module) -> Flow:
        hidden, pack = data
        layout = layout_of(pack)
        rotated = _rotated(self.family, self.config, hidden, pack, self.kind)
        attend = Attend(partial(_attend, layout=layout, keep=self.keep))
        hidden = layer(hidden, attention_mask=attend, position_embeddings=rotated)
        return hidden[:, layout.predicting] if self.last else hidden, pack


def _attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scores: Scores, layout: Layout, keep: bool) -> Tensor:
    """Return attention of a pack: from (1, heads, rows, size) to (1, rows, heads, size)."""
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (q, k, v))
    return attend_segments(q, k, v, layout, scores, keep)[None]


def heads_of(family: Family, hidden: Tensor, norm: nn.Module, module: Any, rotated: Any) -> Heads:
    """Return queries, keys and values (rows, heads, size) of hidden (1, rows, width)."""
    q, k, v = family.heads(module, norm(hidden), rotated)
    return q.squeeze(0), k.squeeze(0), v.squeeze(0)  # an index would cost a fill and a copy in the backward pass


def add_projected(family: Family, hidden: Tensor, out: Tensor, module: Any) -> Tensor:
    """Return hidden plus the projected output of attention, both (1, rows, width)."""
    return hidden + module.get_submodule(family.output_projection)(out)  # type: ignore[no-any-return]


@torch.no_grad()
def _rotated(family: Family, config: Any, x: Tensor, pack: Tensor, kind: str | None = None) -> Any:
    """Return cos and sin (1, T, size) of every token's position, computed once per pack and stage."""
    layout, key = layout_of(pack), ("rotary", id(config), x.dtype, kind)
    if key not in layout.cache:
        rotary = family.rotary(config)
        if rotary is not None and x.is_cuda:  # moved without waiting for the GPU
            rotary._apply(Tensor.pin_memory).to(x.device, non_blocking=True)
        rotated = None if rotary is None else rotate(rotary.to(x.device), x, pack[:, POSITION], kind)
        layout.cache[key] = rotated, config  # as long as the config lives, no other one gets its id
    return layout.cache[key][0]


def head(data: Flow, module: nn.Module, ends: Ends) -> Tensor:
    """Return the pack's share of the mean cross-entropy over all targets, in nats, times the number of packs.

    See `PACKS`. A pack without targets has one row and loss 0. In a pack with candidates each example counts as one
    target, and its loss is that of the choice among them.
    """
    hidden, pack = data
    layout = layout_of(pack)
    if len(layout.wanted) == 0:
        return hidden.sum().float() * 0.0
    if layout.candidates is not None:
        product = logits_product(ends.scaled(hidden.squeeze(0)), module)
        return label_loss(*product, layout.candidates, ends.cap).float() * layout.scale
    return ends.loss(hidden.squeeze(0), module, layout.wanted) * (len(layout.wanted) * layout.scale)


class Chosen(NamedTuple):
    """The places of the candidate that an example wants most and of the one with the highest score; all scores."""

    wanted: int
    best: int
    scores: list[float]


@torch.no_grad()
def chosen(data: Flow, module: nn.Module, config: Any) -> list[Chosen]:
    """Return what the model chooses for each example of a pack with candidates.

    `data`: what the head takes. Of equal ones the first counts.
    """
    hidden, pack = data
    candidates, ends = layout_of(pack).candidates, Ends.of(config)
    if candidates is None:
        return []
    scores = candidate_scores(*logits_product(ends.scaled(hidden.squeeze(0)), module), candidates, ends.cap)
    table = scores.new_full((2, candidates.examples, candidates.most), -torch.inf)
    table[:, candidates.example, candidates.place] = torch.stack((candidates.shares.to(scores.dtype), scores))
    wanted, best = table.argmax(-1).tolist()
    return [Chosen(*of_one) for of_one in zip(wanted, best, table[1].tolist(), strict=True)]
