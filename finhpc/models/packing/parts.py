"""The parts of a model over packs: the same modules and names as over token blocks, see `finhpc.models.packing.layout`.

Only rows that predict a token go through the last block's second half, the last norm and the head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from finhpc.models.families.family import HALVES, Flow, Part
from finhpc.models.families.registry import family_of
from finhpc.models.loss import cross_entropy
from finhpc.models.packing.attention import attend
from finhpc.models.packing.layout import POSITION, TOKEN, layout_of
from finhpc.models.recompute import whole_blocks
from finhpc.settings.training import Recompute

Attended = Callable[[Any, Tensor, Tensor, bool], Tensor]  # (module, x (1, T, width), pack, keep) -> as x


def packed_parts(config: Any, recompute: Recompute = "none") -> list[Part]:
    """`parts_of` over packs: flows are (hidden (1, rows, width), pack), the first part takes a pack, the last gives
    the loss.

    Every token sees all before it: no example may be longer than a model's sliding window.
    """
    family = family_of(config)
    families: dict[str, Attended] = {"gpt2": _gpt2, "llama": partial(_llama, config)}
    attended = families[family.modules]
    row = family.parts(config)
    last = max(i for i, part in enumerate(row) if part.kind == HALVES[0])
    runs: dict[str, Callable[..., Any]] = {
        "embedding": embed,
        "positions": add_positions,
        "dropout": keep,  # a frozen base drops nothing out: a prefix that examples share has one value
        "mlp": mlp,
        "norm": norm,
        "head": tied_head if config.tie_word_embeddings else head,
    }
    made = []
    for i, part in enumerate(row):
        run = runs.get(part.kind)
        if part.kind == HALVES[0]:
            run = partial(attention, attended, recompute == "none", i == last)
        assert run is not None
        made.append(Part(part.names, part.kind, run))
    return whole_blocks(made) if recompute == "full" else made


def without_dropout(config: Any) -> None:
    """A frozen base drops nothing out, whatever its config says; its adapters may."""
    for key in ("attn_pdrop", "resid_pdrop", "embd_pdrop", "attention_dropout"):
        if getattr(config, key, 0):
            setattr(config, key, 0.0)


def embed(pack: Tensor, module: nn.Module) -> Flow:
    return module(pack[:, TOKEN]), pack


def add_positions(data: Flow, module: nn.Module) -> Flow:
    hidden, pack = data
    return hidden + module(pack[:, POSITION]), pack


def keep(data: Flow, module: nn.Module) -> Flow:
    return data


def attention(attended: Attended, keeps: bool, last: bool, data: Flow, norm: nn.Module, module: nn.Module) -> Flow:
    """The first half of a block; the last block's gives the rows that predict a token alone (at least one)."""
    hidden, pack = data
    out = attended(module, norm(hidden), pack, keeps)
    if last:
        rows = layout_of(pack).predicting
        hidden, out = hidden[:, rows], out[:, rows]
    return hidden + _projection(module)(out), pack


def mlp(data: Flow, norm: nn.Module, mlp: nn.Module) -> Flow:
    hidden, pack = data
    return hidden + mlp(norm(hidden)), pack


def norm(data: Flow, module: nn.Module) -> Flow:
    hidden, pack = data
    return module(hidden), pack


def head(data: Flow, module: nn.Module) -> Tensor:
    hidden, pack = data
    return target_loss(module(hidden[0]), pack)


def tied_head(data: Flow, module: nn.Module) -> Tensor:
    hidden, pack = data
    weight = module.weight
    assert isinstance(weight, Tensor)
    return target_loss(F.linear(hidden[0], weight), pack)


def target_loss(logits: Tensor, pack: Tensor) -> Tensor:
    """The pack's share of the mean cross-entropy over all targets, in nats, times the packs; see `PACKS`.

    `logits`: (targets of the pack, vocab), which may be overwritten; a pack without any has one row, and loss 0.
    """
    layout = layout_of(pack)
    if len(layout.wanted) == 0:
        return logits.sum().float() * 0.0
    return cross_entropy(logits, layout.wanted) * (len(layout.wanted) * layout.scale)


def _projection(module: Any) -> nn.Module:
    """The layer after attention."""
    return module.c_proj if hasattr(module, "c_proj") else module.o_proj  # type: ignore[no-any-return]


def _gpt2(module: Any, x: Tensor, pack: Tensor, keeps: bool) -> Tensor:
    heads = (x.shape[1], module.num_heads, module.head_dim)
    q, k, v = (part.reshape(heads) for part in module.c_attn(x)[0].split(module.split_size, -1))
    scale = module.head_dim**-0.5 if module.scale_attn_weights else 1.0
    if module.scale_attn_by_inverse_layer_idx:
        scale /= module.layer_idx + 1
    return attend(q, k, v, layout_of(pack), scale, keeps).view(x.shape)


def _llama(config: Any, module: Any, x: Tensor, pack: Tensor, keeps: bool) -> Tensor:
    layout = layout_of(pack)
    size = module.head_dim
    q, k, v = (linear(x)[0].view(x.shape[1], -1, size) for linear in (module.q_proj, module.k_proj, module.v_proj))
    cos, sin = _rotary(config, x, pack)
    out = attend(_turned(q, cos, sin), _turned(k, cos, sin), v, layout, module.scaling, keeps)
    return out.view(1, x.shape[1], -1)


def _rotary(config: Any, x: Tensor, pack: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin (T, 1, head size) of every token's position, once a pack and stage."""
    parts = layout_of(pack).parts
    key = ("rotary", id(config), x.dtype)
    if key not in parts:
        with torch.no_grad():
            cos, sin = LlamaRotaryEmbedding(config).to(x.device)(x, pack[:, POSITION])
        parts[key] = cos[0, :, None], sin[0, :, None]
    found: tuple[Tensor, Tensor] = parts[key]
    return found


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, as transformers applies them, on (T, heads, size)."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin
