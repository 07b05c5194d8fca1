"""What a model family defines so that finhpc can build, cut, initialize, finetune and decode its models.

A family whose layers can run as they are is one row in `registry.py`; any other one is a file like `gpt2.py`, with a
subclass of `Family`, and one row in `registry.py` or a plugin.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedConfig

from finhpc.lowrank.registry import check_kind
from finhpc.lowrank.replace import Ranks, make_low_rank
from finhpc.lowrank.sltrain import set_supports
from finhpc.models.families.parts import Ends, Flow, Part, add_positions, apply, attend, embed, head, mlp
from finhpc.models.families.presets import Shape
from finhpc.plugins import require
from finhpc.settings.pretrain import Qkv

Heads = tuple[Tensor, Tensor, Tensor]  # q, k, v: (batch, seq, heads, size)
EMBEDDING_DROPOUTS = ("embd_pdrop", "embedding_dropout", "hidden_dropout")  # fields of configs
# All fields of configs for dropout.
DROPOUTS = (*EMBEDDING_DROPOUTS, "resid_pdrop", "attn_pdrop", "attention_dropout", "residual_dropout")


class Family:
    """A transformer family built from transformers' own modules; the names are those of Llama-like models.

    `dense_class` is transformers' model class; `low_rank_class` is made from it.
    """

    embedding: ClassVar[str] = "model.embed_tokens"
    positions: ClassVar[str | None] = None  # the embedding of positions, if they are learned
    blocks: ClassVar[str] = "model.layers"
    attention: ClassVar[tuple[str, str]] = ("input_layernorm", "self_attn")  # norm and module in a block
    mlp: ClassVar[tuple[str, str]] = ("post_attention_layernorm", "mlp")
    output_projection: ClassVar[str] = "o_proj"  # in an attention module
    # End of a linear layer's name -> its key in `method.ranks`.
    projections: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv"), "o_proj": "out",
        **dict.fromkeys(("gate_proj", "up_proj"), "up"), "down_proj": "down",
    }  # fmt: skip
    joint_qkv: ClassVar[str | None] = None  # end of the name of a layer that computes q, k and v at once
    norm: ClassVar[str] = "model.norm"  # after the blocks
    head: ClassVar[str] = "lm_head"
    dropout: ClassVar[str | None] = None  # the dropout of the embeddings, if it is a module
    whole_layers: ClassVar[bool] = False  # blocks run by their layers' own `forward`
    gguf: ClassVar[bool] = True  # its GGUF files are read
    ropes: ClassVar[tuple[str, ...]] = ("default", "linear", "dynamic", "yarn", "llama3")  # kinds of rotary positions
    ropes_by_layer: ClassVar[bool] = False  # rotary positions differ between types of layers
    partial_rotary: ClassVar[bool] = False  # a part of a head may have no rotary positions

    def __init__(self, label: str, dense_class: Any) -> None:
        dense_config = dense_class.config_class
        self.label, self.dense_class, self.name = label, dense_class, str(dense_config.model_type)
        config_fields = {"model_type": f"lowrank_{self.name}"}
        low_rank_config = type(f"LowRank{dense_config.__name__}", (LowRankConfig, dense_config), config_fields)
        model_fields = {"config_class": low_rank_config, "family": self}
        self.low_rank_class: Any = type(f"LowRank{dense_class.__name__}", (LowRankModel, dense_class), model_fields)

    # -- configs ----------------------------------------------------------------------------

    def config_fields(self, shape: Shape) -> dict[str, Any]:
        """Return the fields of transformers' config for a shape."""
        raise NotImplementedError

    def shape_problems(self, shape: Shape) -> list[str]:
        """Return why a shape cannot be built, one message per problem."""
        return []

    def own_settings(self) -> set[str]:
        """Return the fields that the family's config class has itself: its modules compute them."""
        return {*self.dense_class.config_class.__dataclass_fields__} - {*PreTrainedConfig.__dataclass_fields__}

    def layer_types(self, config: dict[str, Any]) -> set[str]:
        """Return the values of `layer_types` in config.json that this family computes."""
        return {"full_attention"}

    def gguf_fields(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return config fields that transformers does not read from a GGUF file's settings `values`."""
        return {}

    def dense_config(self, shape: Shape) -> Any:
        return self.dense_class.config_class(**self.config_fields(shape))

    def low_rank_config(self, shape: Shape, ranks: Ranks, kind: str, qkv: Qkv) -> Any:
        """Return the config of a low-rank model; a low-rank embedding or head is not tied."""
        tied = shape.tie_embeddings and ranks.get("head") is None and ranks.get("embedding") is None
        fields = self.config_fields(shape) | {"tie_word_embeddings": tied, "dense_tied": shape.tie_embeddings}
        return self.low_rank_class.config_class(**fields, low_rank=ranks, low_rank_kind=kind, low_rank_qkv=qkv)

    # -- modules ----------------------------------------------------------------------------

    def layer_kind(self, name: str) -> str | None:
        """Return the kind of the linear layer or embedding of that name; None for any other module."""
        if name in (self.embedding, self.head):
            return "embedding" if name == self.embedding else "head"
        if "attn" in name:
            return "attention"
        return "mlp" if ".mlp." in name else None

    def projection(self, name: str) -> str | None:
        """Return the key in `method.ranks` of the projection of that name; None for any other module."""
        return next((key for end, key in self.projections.items() if name.endswith(f".{end}")), None)

    def rank_key(self, name: str, ranks: Ranks) -> str | None:
        """Return the key of `ranks` for the module of that name: its projection if it is there, else its kind."""
        projection = self.projection(name)
        return projection if projection in ranks else self.layer_kind(name)

    def blocks_of(self, name: str, qkv: Qkv) -> int:
        """Return how many low-rank pairs take the place of the linear layer of that name."""
        joint = self.joint_qkv is not None and name.endswith(f".{self.joint_qkv}")
        return 3 if joint and qkv == "separate" else 1

    def init_std(self, name: str, config: Any) -> float:
        """Return the standard deviation that a weight is initialized with."""
        return float(config.initializer_range)

    # -- forward passes ---------------------------------------------------------------------

    def parts(self, config: Any) -> list[Part]:
        """Return the parts of a model in forward order; a tied head uses the embedding's module again."""
        ends = Ends.of(config)
        row = [Part((self.embedding,), "embedding", partial(embed, ends=ends))]
        if self.positions:
            row.append(Part((self.positions,), "positions", add_positions))
        if self.dropout and any(getattr(config, key, 0) for key in EMBEDDING_DROPOUTS):
            row.append(Part((self.dropout,), "dropout", apply))
        row += self.block_parts(config)
        row.append(Part((self.norm,), "norm", apply))
        head_name = self.embedding if config.tie_word_embeddings else self.head
        row.append(Part((head_name,), "head", partial(head, ends=ends)))
        return row

    def block_parts(self, config: Any) -> list[Part]:
        """Return the parts of the blocks."""
        attention = self.attention_half(config)
        row = []
        for i in range(config.num_hidden_layers):
            row.append(Part(self.block_names(i, self.attention), "attention", attention))
            row.append(Part(self.block_names(i, self.mlp), "mlp", mlp))
        return row

    def block_names(self, i: int, names: tuple[str, str]) -> tuple[str, str]:
        """Return the Hugging Face names of two modules of block `i`."""
        return f"{self.blocks}.{i}.{names[0]}", f"{self.blocks}.{i}.{names[1]}"

    def attention_half(self, config: Any) -> Callable[..., Flow]:
        """Return the `run` of the attention parts: (flow, norm, attention) -> flow."""
        return attend

    def rotary(self, config: Any) -> Any:
        """Return the module that computes rotary positions, (x, positions) -> (cos, sin); None if they are learned."""
        return None

    def heads(self, attention: Any, x: Tensor, rotated: Any) -> Heads:
        """Return queries, keys and values of x (batch, seq, width), for packed examples and cached decoding.

        `rotated`: what `rotary` returns for the positions of x. The attention module's `scaling` is the factor of the
        scores.
        """
        raise NotImplementedError


@dataclass(kw_only=True)
class LowRankConfig:
    """The fields that a low-rank model's config adds to those of the dense one.

    `low_rank`: kind of layer or projection -> rank, or None if it is dense. `low_rank_kind`: `method.kind`.
    `low_rank_qkv`: `method.qkv`. `low_rank_layers`: ranks of single layers by name, which override their kind's.
    `low_rank_sparse`: share, lora_alpha and seed of SLTrain's layers.
    `dense_tied`: whether the dense model ties its head.
    """

    low_rank: dict[str, int | None] | None = None
    low_rank_kind: str = "low_rank"
    low_rank_qkv: Qkv = "joint"
    low_rank_layers: dict[str, int] | None = None
    low_rank_sparse: dict[str, Any] | None = None
    dense_tied: bool = False


class LowRankModel(nn.Module):
    """Makes a model low-rank as its config says; a base class in front of transformers' model class."""

    family: ClassVar[Family]

    def __init__(self, config: Any) -> None:
        require(getattr(config, "finhpc_plugins", None) or (), "this model")
        check_kind(config.low_rank_kind)
        super().__init__(config)
        ranks = config.low_rank or {}
        key_of = partial(self.family.rank_key, ranks=ranks)
        blocks_of = partial(self.family.blocks_of, qkv=config.low_rank_qkv)
        kind, sparse = config.low_rank_kind, config.low_rank_sparse
        make_low_rank(self, ranks, key_of, config.low_rank_layers, kind, blocks_of, sparse)

    def initialize_weights(self) -> None:
        """Called by transformers after it has read a file, which has not the places of SLTrain's entries."""
        super().initialize_weights()  # type: ignore[misc]
        set_supports(self)
