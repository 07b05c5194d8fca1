"""What a model family defines so that finhpc can build, cut, initialize, finetune and decode its models.

A new family is one file like `gpt2.py`, with a subclass of `Family`, and one row in `registry.py` or a plugin.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from finhpc.lowrank.registry import check_kind
from finhpc.lowrank.replace import Ranks, make_low_rank
from finhpc.models.families.presets import Shape
from finhpc.plugins import require

Flow = tuple[Tensor, Tensor]  # (hidden (batch, seq, width), tokens (batch, seq)) between pipeline layers
# (module, x (1, T, width), pack, keep probabilities) -> the input of the output projection, like x
PackedAttention = Callable[[Any, Tensor, Tensor, bool], Tensor]
# (block, q, k, v, scale) with q (batch, heads, seq, size) -> (batch, seq, heads * size) over all keys so far
CachedAttention = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]

HALVES = ("attention", "mlp")  # of a transformer block, in this order
BLOCK = "block"  # both halves as one part
BLOCKS = {**dict.fromkeys(HALVES, 0.5), BLOCK: 1.0}  # kind of part -> share of a block


def describe_parts(kinds: list[str]) -> str:
    """Describe consecutive parts, such as "3.5 blocks, norm, head": attention and MLP are half a block each."""
    words = [kind for kind in kinds if kind not in BLOCKS]
    blocks = sum(BLOCKS[kind] for kind in kinds if kind in BLOCKS)
    if blocks:
        text = "1 block" if blocks == 1 else f"{blocks:g} blocks"
        words.insert(next(i for i, kind in enumerate(kinds) if kind in BLOCKS), text)
    return ", ".join(words)


@dataclass(frozen=True)
class Part:
    """The smallest unit of a pipeline cut: modules of the Hugging Face model and the function that runs them.

    A transformer block is two parts, attention and MLP, each with its norm and residual sum, so that stages can be
    balanced; or one part if only its input is stored for the backward pass (`finhpc.models.recompute`).
    `run(flow, *modules)` takes and returns (hidden, tokens), except that the first part takes only tokens and the
    last returns the loss.
    """

    names: tuple[str, ...]  # Hugging Face names of the modules
    kind: str  # embedding, positions, dropout, attention, mlp, block, norm or head
    run: Callable[..., Any]

    @property
    def in_block(self) -> bool:
        return self.kind in BLOCKS

    def modules(self, model: nn.Module) -> list[nn.Module]:
        """Return this part's modules of `model` in the order that `run` takes them."""
        return [model.get_submodule(name) for name in self.names]


class Family:
    """A transformer family built from transformers' own modules; the defaults are those of Llama-like models.

    `dense_class` is transformers' model class. `low_rank_class` derives from `LowRankModel` and `dense_class`.
    """

    embedding: ClassVar[str] = "model.embed_tokens"
    head: ClassVar[str] = "lm_head"
    output_projection: ClassVar[str] = "o_proj"  # in an attention module

    def __init__(self, label: str, dense_class: Any, low_rank_class: Any) -> None:
        self.label, self.dense_class, self.low_rank_class = label, dense_class, low_rank_class
        self.name: str = dense_class.config_class.model_type
        low_rank_class.family = self

    # -- configs ----------------------------------------------------------------------------

    def config_fields(self, shape: Shape) -> dict[str, Any]:
        """Return the fields of transformers' config for a shape."""
        raise NotImplementedError

    def shape_problems(self, shape: Shape) -> list[str]:
        """Return why a shape cannot be built, one message per problem."""
        return []

    def layer_types(self, config: dict[str, Any]) -> set[str]:
        """Return the values of `layer_types` in config.json that this family computes."""
        return {"full_attention"}

    def gguf_fields(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return config fields that transformers does not read from a GGUF file's settings `values`."""
        return {}

    def dense_config(self, shape: Shape) -> Any:
        return self.dense_class.config_class(**self.config_fields(shape))

    def low_rank_config(self, shape: Shape, ranks: Ranks, kind: str) -> Any:
        """Return the config of a low-rank model; a low-rank embedding or head is not tied."""
        tied = shape.tie_embeddings and ranks.get("head") is None and ranks.get("embedding") is None
        fields = self.config_fields(shape) | {"tie_word_embeddings": tied, "dense_tied": shape.tie_embeddings}
        return self.low_rank_class.config_class(**fields, low_rank=ranks, low_rank_kind=kind)

    # -- modules ----------------------------------------------------------------------------

    def layer_kind(self, name: str) -> str | None:
        """Return the kind of the linear layer or embedding of that name; None for any other module."""
        if name in (self.embedding, self.head):
            return "embedding" if name == self.embedding else "head"
        if "attn" in name:
            return "attention"
        return "mlp" if ".mlp." in name else None

    def init_std(self, name: str, config: Any) -> float:
        """Return the standard deviation that a weight is initialized with."""
        return float(config.initializer_range)

    # -- forward passes ---------------------------------------------------------------------

    def parts(self, config: Any) -> list[Part]:
        """Return the parts of a model in forward order; a tied head uses the embedding's module again."""
        raise NotImplementedError

    def packed_attention(self, config: Any) -> PackedAttention:
        """Return attention over packed examples, up to the input of the output projection."""
        raise NotImplementedError

    def decode(self, model: Any, tokens: Tensor, positions: Tensor, attend: CachedAttention) -> Tensor:
        """Return the normalized hidden state (batch, width) of the last of `tokens` (batch, seq).

        `attend` stores keys and values and attends to all of them so far.
        """
        raise NotImplementedError


@dataclass(kw_only=True)
class LowRankConfig:
    """The fields that a low-rank model's config adds; list it before transformers' config class.

    `low_rank`: kind of layer -> rank, or None if it is dense. `low_rank_kind`: `method.kind`. `low_rank_layers`:
    ranks of single layers by name, which override their kind's. `dense_tied`: whether the dense model ties its head.
    """

    low_rank: dict[str, int | None] | None = None
    low_rank_kind: str = "low_rank"
    low_rank_layers: dict[str, int] | None = None
    dense_tied: bool = False


class LowRankModel(nn.Module):
    """Makes a model class of transformers low-rank as its config says; list it before that class."""

    family: ClassVar[Family]

    def __init__(self, config: Any) -> None:
        require(getattr(config, "finhpc_plugins", None) or (), "this model")
        check_kind(config.low_rank_kind)
        super().__init__(config)
        kind_of = self.family.layer_kind
        make_low_rank(self, config.low_rank or {}, kind_of, config.low_rank_layers, config.low_rank_kind)
