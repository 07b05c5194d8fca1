"""A model family as a plugin writes it: own module names, learned positions, one matrix for q, k and v."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from finhpc.models.families import parts
from finhpc.models.families.family import Family, Heads
from finhpc.models.families.presets import PRESETS, Shape
from finhpc.models.families.registry import FAMILIES


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
        self.scaling = self.size**-0.5
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)

    def heads(self, x: Tensor) -> Heads:
        q, k, v = (part.reshape(*x.shape[:-1], -1, self.size) for part in self.qkv(x).chunk(3, -1))
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        attended = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in self.heads(x)), is_causal=True)
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


class Mixer(Family):
    embedding, positions = "net.words", "net.places"
    blocks, attention, mlp = "net.stack", ("before_mix", "mix"), ("before_feed", "feed")
    output_projection, norm = "out", "net.last"

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

    def attention_half(self, config: Any) -> Any:
        return parts.mlp  # x + f(norm(x)) too

    def heads(self, attention: Any, x: Tensor, rotated: None) -> Heads:
        return attention.heads(x)  # type: ignore[no-any-return]


FAMILIES.register("mixer", Mixer("Mixer", MixerForCausalLM))
PRESETS.register("mixer-nano", Shape("mixer", 2, 32, 4, 64, 300, tie_embeddings=False))
