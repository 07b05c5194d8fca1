"""What a model family has to say so that finhpc can build, cut and initialise it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from finhpc.models.presets import Shape

Flow = tuple[Tensor, Tensor]  # (hidden (batch, seq, width), tokens (batch, seq)) between pipeline layers


@dataclass(frozen=True)
class Part:
    """One pipeline layer: a module of the Hugging Face model and how data flows through it.

    `run(module, flow)` takes (hidden, tokens) and returns the same, except that the first part
    takes tokens alone and the last returns the loss.
    """

    name: str  # the module's Hugging Face name
    kind: str  # embedding, positions, block, norm or head
    run: Callable[[nn.Module, Any], Any]


@dataclass(frozen=True)
class Family:
    """A transformer family on transformers' own modules."""

    name: str
    dense_config: Callable[[Shape], Any]
    low_rank_config: Callable[..., Any]
    dense_class: Any
    low_rank_class: Any
    parts: Callable[[Any], list[Part]]
    init_std: Callable[[str, Any], float]
