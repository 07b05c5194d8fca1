"""Model shapes by name; light, so that `--help` can list them.

GPT-2: Radford et al. 2019 (127M and 1.5B as FinGPT-HPC, section VI.A, calls them).
Llama 2: Touvron et al. 2023. The small ones are for CPUs. A plugin adds its own by `PRESETS.register`.
"""

from __future__ import annotations

from dataclasses import dataclass

from finhpc.errors import ConfigError
from finhpc.plugins import Registry


@dataclass(frozen=True)
class Shape:
    """The size of a transformer."""

    family: str
    layers: int
    width: int
    heads: int
    context: int
    vocab_size: int
    tie_embeddings: bool
    kv_heads: int = 0  # 0: as many as heads
    mlp_width: int = 0  # 0: the family's own rule
    dropout: float = 0.0


def _gpt2(layers: int, width: int, heads: int, vocab_size: int = 50257, context: int = 1024) -> Shape:
    return Shape("gpt2", layers, width, heads, context, vocab_size, tie_embeddings=True)


def _llama(layers: int, width: int, heads: int, mlp: int, kv_heads: int = 0, vocab: int = 32000) -> Shape:
    return Shape("llama", layers, width, heads, 4096, vocab, False, kv_heads=kv_heads, mlp_width=mlp)


SHAPES = {
    "gpt2-tiny": _gpt2(4, 128, 4),
    "gpt2-small-cpu": _gpt2(6, 384, 6),
    "gpt2-127m": _gpt2(12, 768, 12),
    "gpt2-1.5b": _gpt2(48, 1600, 25),
    "llama-tiny": _llama(4, 128, 4, 352, kv_heads=2),
    "llama-small-cpu": _llama(6, 384, 6, 1024),
    "smollm2-135m": Shape("llama", 30, 576, 9, 2048, 49152, tie_embeddings=True, kv_heads=3, mlp_width=1536),
    "llama-1b": _llama(16, 2048, 32, 8192, kv_heads=8),
    "llama2-7b": _llama(32, 4096, 32, 11008),
    "llama2-13b": _llama(40, 5120, 40, 13824),
    "llama2-70b": _llama(80, 8192, 64, 28672, kv_heads=8),
}


def _check_shape(name: str, shape: object) -> None:
    if not isinstance(shape, Shape):
        raise ConfigError(f"model.preset={name} must be a finhpc.models.families.presets.Shape.")


PRESETS: Registry[Shape] = Registry("model.preset", SHAPES, _check_shape)
