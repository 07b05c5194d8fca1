"""A model family as a plugin writes it: own module names, learned positions, one matrix for q, k and v."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from finhpc.models.families import flow
from finhpc.models.families.family import (
    CachedAttention,
    Family,
    Flow,
    LowRankConfig,
    LowRankModel,
    PackedAttention,
    Part,
)
from finhpc.models.families.presets import PRESETS, Shape
from finhpc.models.families.registry import FAMILIES
from finhpc.models.packing.attention import attend_segments
from finhpc.models.packing.layout import layout_of


class MixerConfig(PreTrainedConfig):
    model_type = "mixer"
    vocab_size: int = 300
    hidden_size: int = 32
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    max_position_embeddings: int = 64
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False


class Mix(nn.Module):
    def __init__(self, config: MixerConfig) -> None:
        super().__init__()
        self.size = config.hidden_size // config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)

    def heads(self, x: Tensor) -> list[Tensor]:
        return [flow.split_heads(part, self.size) for part in self.qkv(x).chunk(3, -1)]

    def forward(self, x: Tensor) -> Tensor:
        attended = F.scaled_dot_product_attention(*self.heads(x), is_causal=True)
        return self.out(attended.transpose(1, 2).reshape(x.shape))  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, config: MixerConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.before_mix, self.before_feed = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix = Mix(config)
        self.feed = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class MixerForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = MixerConfig
    base_model_prefix = "net"
    _supports_sdpa = True
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "net.words.weight"}

    def __init__(self, config: MixerConfig) -> None:
        super().__init__(config)
        self.net = nn.Module()
        self.net.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.net.places = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.net.stack = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.net.last = nn.LayerNorm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> Any:
        return self.net.words

    def forward(self, input_ids: Tensor, **unused: Any) -> CausalLMOutput:
        hidden = self.net.words(input_ids) + self.net.places(torch.arange(input_ids.shape[1]))
        for block in self.net.stack:
            hidden = hidden + block.mix(block.before_mix(hidden))
            hidden = hidden + block.feed(block.before_feed(hidden))
        return CausalLMOutput(logits=self.lm_head(self.net.last(hidden)))


class LowRankMixerConfig(LowRankConfig, MixerConfig):
    model_type = "lowrank_mixer"


class LowRankMixerForCausalLM(LowRankModel, MixerForCausalLM):
    config_class = LowRankMixerConfig


class Mixer(Family):
    embedding = "net.words"
    output_projection = "out"

    def config_fields(self, shape: Shape) -> dict[str, Any]:
        return {
            "vocab_size": shape.vocab_size,
            "hidden_size": shape.width,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "max_position_embeddings": shape.context,
            "tie_word_embeddings": shape.tie_embeddings,
        }

    def layer_kind(self, name: str) -> str | None:
        if ".mix." in name:
            return "attention"
        return "mlp" if ".feed." in name else super().layer_kind(name)

    def parts(self, config: Any) -> list[Part]:
        row = [Part((self.embedding,), "embedding", flow.embed), Part(("net.places",), "positions", _places)]
        for i in range(config.num_hidden_layers):
            block = f"net.stack.{i}"
            row.append(Part((f"{block}.before_mix", f"{block}.mix"), "attention", flow.mlp))  # x + f(norm(x)) too
            row.append(Part((f"{block}.before_feed", f"{block}.feed"), "mlp", flow.mlp))
        row.append(Part(("net.last",), "norm", flow.apply))
        row.append(Part((self.embedding if config.tie_word_embeddings else self.head,), "head", flow.head))
        return row

    def packed_attention(self, config: Any) -> PackedAttention:
        return partial(_packed, config.hidden_size // config.num_attention_heads)

    def decode(self, model: Any, tokens: Tensor, positions: Tensor, attend: CachedAttention) -> Tensor:
        hidden = model.net.words(tokens) + model.net.places(positions)
        for i, block in enumerate(model.net.stack):
            attended = attend(i, *block.mix.heads(block.before_mix(hidden)), block.mix.size**-0.5)
            hidden = hidden + block.mix.out(attended.to(hidden.dtype))
            hidden = hidden + block.feed(block.before_feed(hidden))
        return model.net.last(hidden[:, -1])  # type: ignore[no-any-return]


def _places(data: Flow, module: nn.Module) -> Flow:
    hidden, tokens = data
    return hidden + module(torch.arange(tokens.shape[1])), tokens


def _packed(size: int, module: Any, x: Tensor, pack: Tensor, keep: bool) -> Tensor:
    q, k, v = (part.reshape(x.shape[1], -1, size) for part in module.qkv(x)[0].chunk(3, -1))
    return attend_segments(q, k, v, layout_of(pack), size**-0.5, keep).view(x.shape)


FAMILIES.register("mixer", Mixer("Mixer", MixerForCausalLM, LowRankMixerForCausalLM))
PRESETS.register("mixer-nano", Shape("mixer", 2, 32, 4, 64, 300, tie_embeddings=False))
