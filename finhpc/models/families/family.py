"""What a model family has to say so that finhpc can build, cut and initialise it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from finhpc.models.families.presets import Shape

Flow = tuple[Tensor, Tensor]  # (hidden (batch, seq, width), tokens (batch, seq)) between pipeline layers

HALVES = ("attention", "mlp")  # of a transformer block, one after the other
BLOCK = "block"  # both as one part
BLOCKS = {**dict.fromkeys(HALVES, 0.5), BLOCK: 1.0}  # kind of part -> how much of a block it is


def describe_parts(kinds: list[str]) -> str:
    """Parts in a row in words, such as "3.5 blocks, norm, head": attention and MLP are half a block each."""
    words = [kind for kind in kinds if kind not in BLOCKS]
    blocks = sum(BLOCKS[kind] for kind in kinds if kind in BLOCKS)
    if blocks:
        words.insert(next(i for i, kind in enumerate(kinds) if kind in BLOCKS), f"{blocks:g} blocks")
    return ", ".join(words)


@dataclass(frozen=True)
class Part:
    """One pipeline layer: modules of the Hugging Face model and how data flows through them.

    A transformer block is two parts, attention and MLP, each with its norm and its residual sum, so
    that stages can be cut evenly; or one, where it keeps its input alone (`finhpc.models.recompute`).
    `run(flow, *modules)` takes (hidden, tokens) and returns the same,
    except that the first part takes tokens alone and the last returns the loss.
    """

    names: tuple[str, ...]  # the modules' Hugging Face names
    kind: str  # embedding, positions, dropout, attention, mlp, block, norm or head
    run: Callable[..., Any]

    @property
    def in_block(self) -> bool:
        return self.kind in BLOCKS

    def modules(self, model: nn.Module) -> list[nn.Module]:
        """This part's modules of `model`, in the order that `run` takes them."""
        return [model.get_submodule(name) for name in self.names]


@dataclass(frozen=True)
class Family:
    """A transformer family on transformers' own modules. `modules`: whose names they bear, `gpt2` or `llama`."""

    name: str
    modules: str
    dense_config: Callable[[Shape], Any]
    low_rank_config: Callable[..., Any]
    dense_class: Any
    low_rank_class: Any
    parts: Callable[[Any], list[Part]]
    init_std: Callable[[str, Any], float]
