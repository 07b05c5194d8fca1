"""Families that run by their description in transformers, without code of their own.

`base_model_pp_plan` of a config class names the model's embedding, layers and last norm. A layer runs by its own
`forward`, which has all that differs between families: norms, biases, parallel halves, rotary positions, factors,
windows. Attention comes back to finhpc through transformers' attention interface (`finhpc.models.attention`), also for
packed examples and cached decoding. What a model's `forward` does outside of its layers is in `Ends`.

A family is listed only if a layer returns its hidden states alone, takes its positions as `position_embeddings`, passes
`attention_mask` on to the attention interface, and keeps no state between tokens except keys and values. The tests
compare each row with transformers.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any, ClassVar

from torch import nn

from finhpc.errors import ConfigError
from finhpc.models.families.family import Family
from finhpc.models.families.parts import LAYER, Flow, Part, Rotated
from finhpc.models.families.presets import Shape
from finhpc.settings.pretrain import Qkv

FUSED = ("qkv_proj", "query_key_value")  # names of layers that compute queries, keys and values at once
ROTATED = ("partial_rotary_factor", "rotary_pct")  # names of the share of a head that has rotary positions
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
PLAN = ("embed_tokens", "layers", "norm")  # of a config class without a plan, which has Llama's names


class Described(Family):
    """A family whose layers run as transformers has them; its models start from a folder, not from a shape."""

    whole_layers, gguf = True, False
    projections: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", *FUSED), "qkv"), "o_proj": "out", "attention.dense": "out",
        **dict.fromkeys(("gate_proj", "up_proj", "gate_up_proj", "c_fc", "dense_h_to_4h"), "up"),
        **dict.fromkeys(("down_proj", "c_proj", "dense_4h_to_h"), "down"),
    }  # fmt: skip

    def __init__(self, label: str, dense_class: Any, ropes: tuple[str, ...] = Family.ropes) -> None:
        super().__init__(label, dense_class)
        plan = getattr(dense_class.config_class, "base_model_pp_plan", None) or PLAN
        embedding, *dropout, blocks, norm = (f"{dense_class.base_model_prefix}.{name}" for name in plan)
        self.embedding, self.blocks, self.norm = embedding, blocks, norm  # type: ignore[misc]
        self.dropout = dropout[0] if dropout else None  # type: ignore[misc]
        # Some classes' default ids of special tokens lie outside their default vocabulary, which transformers reports.
        rope = dense_class.config_class(**NO_TOKENS).rope_parameters
        self.ropes_by_layer = any(isinstance(value, dict) for value in rope.values())  # type: ignore[misc]
        self.partial_rotary = "partial_rotary_factor" in rope  # type: ignore[misc]
        self.ropes = ropes  # type: ignore[misc]

    def own_settings(self) -> set[str]:
        """Return also the names that the config class reads the rotated share of a head from."""
        own = super().own_settings()
        if self.partial_rotary:
            made = {name: self.dense_class.config_class(**{name: 0.5}, **NO_TOKENS).rope_parameters for name in ROTATED}
            own |= {name for name, rope in made.items() if rope[ROTATED[0]] == 0.5}
        return own

    def shape_problems(self, shape: Shape) -> list[str]:
        return [f"{self.label} models start from weights, not from a shape; give model.path with a model folder."]

    def layer_types(self, config: dict[str, Any]) -> set[str]:
        return {"full_attention", "sliding_attention"}

    def layer_kind(self, name: str) -> str | None:
        return "attention" if ".attention." in name else super().layer_kind(name)

    def blocks_of(self, name: str, qkv: Qkv) -> int:
        if qkv == "separate" and name.endswith(FUSED):
            raise ConfigError(
                f"method.qkv=separate does not fit {self.label}, whose {name.rpartition('.')[2]} computes queries, "
                "keys and values at once; use method.qkv=joint."
            )
        return 1

    # -- forward passes ---------------------------------------------------------------------

    def block_parts(self, config: Any) -> list[Part]:
        runs = {kind: Layer(partial(self.rotary, config), kind) for kind in set(position_kinds(config))}
        return [Part((f"{self.blocks}.{i}",), LAYER, runs[kind]) for i, kind in enumerate(position_kinds(config))]

    def rotary(self, config: Any) -> Any:
        rotary = _rotary_class(self.dense_class)(config)
        # No sequence is longer than that for which these types change their frequencies, see `context_of`.
        if getattr(rotary, "rope_type", None) in ("longrope", "dynamic"):
            rotary.rope_type = "constant"
        return rotary


class Layer(Rotated):
    """Runs layers by their own `forward`; those of a stage with the same kind of positions share one instance."""

    def __call__(self, data: Flow, layer: nn.Module) -> Flow:
        hidden, tokens = data
        self.prepare(data)
        return layer(hidden, attention_mask=None, position_embeddings=self.of(hidden)), tokens


def position_kinds(config: Any) -> list[str | None]:
    """Return for each layer the key of its rotary positions in `rope_parameters`; None if all layers share theirs."""
    several = any(isinstance(value, dict) for value in (config.rope_parameters or {}).values())
    return list(config.layer_types) if several else [None] * config.num_hidden_layers


def _rotary_class(dense_class: Any) -> Any:
    """Return the class of a family's rotary positions, the only one in its module of transformers."""
    module = sys.modules[dense_class.__module__]
    [found] = [value for name, value in vars(module).items() if name.endswith("RotaryEmbedding")]
    return found
