"""A model on disk, frozen and perhaps quantised, with adapters beside its linear layers: what finetuning trains.

Each stage reads its own weights alone, one at a time, and quantises each before the next is read: memory is the
quantised stage and one layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from finhpc.config import Recompute
from finhpc.config.finetune import FinetuneConfig, FinetuneQuantization, Lora
from finhpc.lowrank.layers import LowRankLinear
from finhpc.models.families import skeleton
from finhpc.models.family import BLOCKS, Part
from finhpc.models.lora import FrozenPair, LoraLinear
from finhpc.models.lora_start import MOVES_BASE, linear_shape, scale_of, scheme_of, start, target_names
from finhpc.models.packed_parts import packed_parts, without_dropout
from finhpc.models.pipeline import Layer, stage_borders
from finhpc.models.weights import Weights
from finhpc.quantization.frozen import Frozen, freeze

HEAD_ROWS = 1 / 16  # rows of a pack that predict a token, as counted costs take it


@dataclass
class Adaptation:
    """What is trained beside what: `weights` of the base, adapters as `lora` says, the base's bits and type.

    `bf16`: the base and all activations are bfloat16, else float32; adapters are float32 always. Raises `ConfigError`
    when made for settings that do not fit the model.
    """

    weights: Weights
    lora: Lora
    quantization: FinetuneQuantization
    bf16: bool = False
    recompute: Recompute = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        self.scheme = scheme_of(self.quantization)
        self.targets = target_names(self.weights.skeleton, self.lora, self.quantization.bits)
        self.parts()

    @classmethod
    def of(cls, config: FinetuneConfig, weights: Weights) -> Adaptation:
        train = config.train
        return cls(weights, config.lora, config.quantization, train.precision == "bf16", train.recompute, train.seed)

    @property
    def hf_config(self) -> Any:
        return self.weights.config

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float32

    def parts(self) -> list[Part]:
        return packed_parts(self.hf_config, self.recompute)

    @cached_property
    def skeleton(self) -> nn.Module:
        """The model that layers are taken from: on the meta device until a layer is made."""
        without_dropout(config := type(self.hf_config).from_dict(self.hf_config.to_dict()))
        return skeleton(config)

    def borders(self, stages: int) -> list[int]:
        """The cut into stages by counted multiplications: a frozen weight costs its product, forward and backward.

        The head is computed for the rows that predict a token alone.
        """
        row = self.parts()
        costs = []
        for part in row:
            size = sum(p.numel() for m in part.modules(self.weights.skeleton) for p in m.parameters() if p.dim() == 2)
            costs.append(size * (1.0 if part.kind in BLOCKS else HEAD_ROWS if part.kind == "head" else 0.0))
        return stage_borders(row, costs, stages)

    # -- layers -----------------------------------------------------------------------------

    @torch.no_grad()
    def fill(self, module: nn.Module, name: str, device: torch.device) -> nn.Module:
        """The module with its weights, frozen, and adapters where they go; linear layers are replaced."""
        for sub_name, sub in list(module.named_modules()):
            full = f"{name}.{sub_name}" if sub_name else name
            if linear_shape(sub) is not None:
                made = self._linear(sub, full, device)
                if not sub_name:
                    return made
                module.set_submodule(sub_name, made)
                continue
            for key, parameter in list(sub.named_parameters(recurse=False)):
                if parameter.is_meta:
                    value = self.weights.read(f"{full}.{key}").to(device, self.dtype)
                    setattr(sub, key, nn.Parameter(value, requires_grad=False))
        return module

    def _linear(self, module: nn.Module, name: str, device: torch.device) -> nn.Module:
        base: Frozen | FrozenPair
        adapted, started = name in self.targets, None
        bias = None if getattr(module, "bias", None) is None else self.weights.read(f"{name}.bias").to(device)
        if isinstance(module, LowRankLinear):
            a = self._frozen(f"{name}.A", self.weights.read(f"{name}.A").to(device), None)
            b = self._frozen(f"{name}.B", self.weights.read(f"{name}.B").to(device), bias)
            base = FrozenPair(a, b, module.between)
        else:
            rows = self.weights.read(f"{name}.weight").to(device)
            if isinstance(module, Conv1D):
                rows = rows.T
            if adapted and self.lora.init in MOVES_BASE:
                started = start(self.lora, self.targets[name], self.seed, name, rows)
                rows = rows - scale_of(self.lora) * started[1] @ started[0]
            base = self._frozen(name, rows, bias)
        if not adapted:
            return base
        a_start, b_start = started or start(self.lora, self.targets[name], self.seed, name)
        return LoraLinear(base, a_start.to(device), b_start.to(device), scale_of(self.lora), self.lora.dropout)

    def bits_of(self, name: str) -> int:
        """Bits of a linear layer's weights: as bitsandbytes and peft do, the head stays in float."""
        return 16 if name.partition(".")[0] == "lm_head" else self.quantization.bits

    def _frozen(self, name: str, rows: Tensor, bias: Tensor | None) -> Frozen:
        return freeze(rows, bias, self.bits_of(name), self.scheme, self.dtype, name)


class AdaptedLayer(Layer):
    """One part of an adapted model. Its only parameters that are trained, and named, are its adapters'."""

    def __init__(self, part: Part, adaptation: Adaptation, device: torch.device) -> None:
        nn.Module.__init__(self)
        self.part, self.bf16, self.device_type = part, False, device.type  # the type is the base's: no autocast
        made = []
        for name in part.names:
            module = adaptation.fill(adaptation.skeleton.get_submodule(name), name, device)
            adaptation.skeleton.set_submodule(name, module)
            made.append(module)
        self.parts = nn.ModuleList(made)

    def parameters_by_name(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name of the adapted layer + .A or .B, parameter)."""
        for prefix, module in zip(self.part.names, self.parts, strict=True):
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    yield f"{prefix}.{name}", parameter
