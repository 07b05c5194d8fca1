"""The parts of a model, of which pipeline stages are made, and how data flows through those that families share.

The tokens travel with the hidden states through the pipeline, so only the first stage reads data and the last has its
labels. Documents in a block are separated only by the end-of-text token: attention crosses document borders, as in
GPT-2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finhpc.models.loss import head_loss

Compiled = Callable[[Callable[..., Any]], Callable[..., Any]]  # returns a function compiled, or as it is
Flow = tuple[Tensor, Tensor]  # (hidden (batch, seq, width), tokens (batch, seq)) between pipeline layers
HALVES = ("attention", "mlp")  # of a transformer block, in this order
BLOCK = "block"  # both halves as one part that stores only its input
LAYER = "layer"  # a whole block by its own `forward`
BLOCKS = {**dict.fromkeys(HALVES, 0.5), BLOCK: 1.0, LAYER: 1.0}  # kind of part -> share of a block


def as_it_is(run: Callable[..., Any]) -> Callable[..., Any]:
    """The `Compiled` that does not compile."""
    return run


def describe_parts(kinds: list[str]) -> str:
    """Describe consecutive parts, such as "3.5 blocks, norm, head": attention and MLP are half a block each."""
    words = [kind for kind in kinds if kind not in BLOCKS]
    blocks = sum(BLOCKS[kind] for kind in kinds if kind in BLOCKS)
    if blocks:
        first = next(i for i, kind in enumerate(kinds) if kind in BLOCKS)
        words.insert(first, "1 block" if blocks == 1 else f"{blocks:g} blocks")
    return ", ".join(words)


@dataclass(frozen=True)
class Part:
    """The smallest unit of a pipeline cut: modules of the Hugging Face model and the function that runs them.

    A transformer block is two parts, attention and MLP, each with its norm and residual sum, so that stages can be
    balanced; or one part if only its input is stored for the backward pass (`finhpc.models.recompute`), or if its
    family runs whole layers.
    `run(flow, *modules)` takes and returns (hidden, tokens), except that the first part takes only tokens and the
    last returns the loss.
    """

    names: tuple[str, ...]  # Hugging Face names of the modules
    kind: str  # embedding, positions, dropout, attention, mlp, block, layer, norm or head
    run: Callable[..., Any]

    @property
    def in_block(self) -> bool:
        return self.kind in BLOCKS

    def modules(self, model: nn.Module) -> list[nn.Module]:
        """Return this part's modules of `model` in the order that `run` takes them."""
        return [model.get_submodule(name) for name in self.names]


@dataclass(frozen=True)
class Ends:
    """What a model's own `forward` does to its embeddings and logits: it multiplies both, and may cap the logits.

    Granite's embedding_multiplier and logits_scaling; the final_logit_softcapping of Gemma 2 (Gemma Team 2024, section
    2), cap * tanh(logits / cap).
    """

    embedding: float = 1.0
    logits: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, config: Any) -> Ends:
        embedding, scaling = (float(getattr(config, key, 1.0)) for key in ("embedding_multiplier", "logits_scaling"))
        return cls(embedding, 1 / scaling, getattr(config, "final_logit_softcapping", None))

    def embed(self, module: nn.Module, tokens: Tensor) -> Tensor:
        """Return the hidden states of tokens."""
        hidden: Tensor = module(tokens)
        return hidden if self.embedding == 1 else hidden * self.embedding

    def loss(self, rows: Tensor, module: nn.Module, targets: Tensor) -> Tensor:
        """Return `head_loss` of hidden states."""
        return head_loss(self.scaled(rows), module, targets, self.cap)

    def scaled(self, rows: Tensor) -> Tensor:
        """Return hidden states by the factor of their logits."""
        return rows if self.logits == 1 else rows * self.logits

    def predict(self, rows: Tensor, module: nn.Module) -> Tensor:
        """Return the logits of hidden states."""
        logits: Tensor = module(rows)
        logits = logits if self.logits == 1 else logits * self.logits
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


class Rotated:
    """Rotary positions of whole samples, computed once for each sequence length.

    `rotary` returns the module (x, positions) -> (cos, sin), which takes the layer's type as well if `kind` is one.
    """

    def __init__(self, rotary: Callable[[], Any], kind: str | None = None) -> None:
        self.rotary, self.kind = rotary, kind
        self.rotated: dict[tuple[int, torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}  # cos and sin

    def of(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `prepare` computed for hidden states of this length."""
        return self.rotated[hidden.shape[1], hidden.dtype, hidden.device]

    @torch.no_grad()
    def prepare(self, data: Flow) -> None:
        """Compute the rotary positions of a sequence length once, outside of a compiled graph."""
        hidden = data[0]
        key = (hidden.shape[1], hidden.dtype, hidden.device)
        if key not in self.rotated:
            rotary = self.rotary().to(hidden.device)  # the skeleton's is on the meta device
            positions = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
            self.rotated[key] = rotate(rotary, hidden, positions, self.kind)


def rotate(rotary: Any, x: Tensor, positions: Tensor, kind: str | None) -> Any:
    """Return cos and sin of positions for layers of a kind; None if there are no rotary positions."""
    if rotary is None:
        return None
    return rotary(x, positions) if kind is None else rotary(x, positions, kind)


def embed(tokens: Tensor, module: nn.Module, ends: Ends) -> Flow:
    return ends.embed(module, tokens), tokens


def add_positions(flow: Flow, module: nn.Module) -> Flow:
    hidden, tokens = flow
    positions = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
    return hidden + module(positions), tokens


def apply(flow: Flow, module: nn.Module) -> Flow:
    hidden, tokens = flow
    return module(hidden), tokens


def attend(flow: Flow, norm: nn.Module, attention: nn.Module) -> Flow:
    hidden, tokens = flow
    return hidden + attention(norm(hidden))[0], tokens


def mlp(flow: Flow, norm: nn.Module, mlp: nn.Module) -> Flow:
    hidden, tokens = flow
    return hidden + mlp(norm(hidden)), tokens


def head(flow: Flow, module: nn.Module, ends: Ends) -> Tensor:
    """Return the mean cross-entropy in nats of each next token, in float32, as transformers computes it.

    A sample's last state predicts nothing.
    """
    hidden, tokens = flow
    rows = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    return ends.loss(rows, module, tokens[:, 1:].reshape(-1))
