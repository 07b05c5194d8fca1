"""A model on disk, frozen and perhaps quantised, with adapters beside its linear layers: what finetuning trains.

Each stage reads its own weights alone, one at a time, and quantises each before the next is read: memory is the
quantised stage and one layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from finhpc.lowrank.layers import LowRankLinear
from finhpc.models.families.family import BLOCKS, Part
from finhpc.models.families.registry import skeleton
from finhpc.models.files.weights import Weights
from finhpc.models.lora.layers import FrozenLowRankLinear, LoraLinear
from finhpc.models.lora.quantized_cache import kept
from finhpc.models.lora.targets import CHANGES_BASE, linear_shape, scale_of, scheme_of, start, target_names
from finhpc.models.packing.parts import packed_parts, without_dropout
from finhpc.models.pipeline import PipelineLayer, stage_borders
from finhpc.quantization.frozen import FrozenLinear, freeze, hold, is_quantized
from finhpc.settings.finetune import FinetuneConfig, FinetuneQuantization, Lora
from finhpc.settings.training import Recompute

HEAD_ROWS = 1 / 16  # rows of a pack that predict a token, as counted costs take it


@dataclass(frozen=True)
class Matrix:
    """A frozen matrix of `shape` (out, in): of a linear layer, or a factor of a low-rank one.

    `stored`: its name in the model, where it is (in, out) if `transposed`.
    """

    name: str
    shape: tuple[int, int]
    stored: str
    transposed: bool = False


def matrices_of(module: nn.Module, name: str) -> list[Matrix]:
    """Those of a linear layer, in the order they are multiplied by; none of any other module."""
    shape = linear_shape(module)
    if shape is None:
        return []
    if isinstance(module, LowRankLinear):
        a, b = f"{name}.A", f"{name}.B"
        return [Matrix(a, (module.rank, shape[1]), a), Matrix(b, (shape[0], module.rank), b)]
    return [Matrix(name, shape, f"{name}.weight", isinstance(module, Conv1D))]


@dataclass
class LoraModel:
    """What is trained beside what: `weights` of the base, adapters as `lora` says, the base's bits and type.

    `bf16`: the base and all activations are bfloat16, else float32; adapters are float32 always. `kept`: a folder
    with the base's matrices already quantized, see `finhpc.models.lora.quantized_cache`. Raises `ConfigError` for
    settings that do not fit the model.
    """

    weights: Weights
    lora: Lora
    quantization: FinetuneQuantization
    bf16: bool = False
    recompute: Recompute = "none"
    seed: int = 0
    kept: Path | None = None

    def __post_init__(self) -> None:
        self.scheme = scheme_of(self.quantization)
        self.targets = target_names(self.weights.skeleton, self.lora, self.quantization.bits)
        self.parts()

    @classmethod
    def of(cls, config: FinetuneConfig, weights: Weights, kept: Path | None = None) -> LoraModel:
        train = config.train
        bf16 = train.precision == "bf16"
        return cls(weights, config.lora, config.quantization, bf16, train.recompute, train.seed, kept)

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
        base: FrozenLinear | FrozenLowRankLinear
        adapted, started = name in self.targets, None
        bias = None if getattr(module, "bias", None) is None else self.weights.read(f"{name}.bias").to(device)
        first, *more = matrices_of(module, name)
        if isinstance(module, LowRankLinear):
            pair = self._frozen(first, None, device), self._frozen(more[0], bias, device)
            base = FrozenLowRankLinear(*pair, module.between)
        elif adapted and self.lora.init in CHANGES_BASE:  # never quantised
            rows = self.rows(first).to(device)
            started = start(self.lora, self.targets[name], self.seed, name, rows)
            base = freeze(rows - scale_of(self.lora) * started[1] @ started[0], bias, 16, "", self.dtype, name)
        else:
            base = self._frozen(first, bias, device)
        if not adapted:
            return base
        a_start, b_start = started or start(self.lora, self.targets[name], self.seed, name)
        return LoraLinear(base, a_start.to(device), b_start.to(device), scale_of(self.lora), self.lora.dropout)

    # -- the base's matrices ----------------------------------------------------------------

    def quantized_matrices(self) -> list[Matrix]:
        """Those that the base's bits leave quantised, in the model's order; none at 16 bits."""
        modules = self.weights.skeleton.named_modules()
        return [matrix for name, module in modules for matrix in matrices_of(module, name) if self._quantizes(matrix)]

    def rows(self, matrix: Matrix) -> Tensor:
        """The matrix (out, in), in float32."""
        stored = self.weights.read(matrix.stored)
        return stored.T if matrix.transposed else stored

    def bits_of(self, name: str) -> int:
        """Bits of a linear layer's weights: as bitsandbytes and peft do, the head stays in float."""
        return 16 if name.partition(".")[0] == "lm_head" else self.quantization.bits

    def _quantizes(self, matrix: Matrix) -> bool:
        return is_quantized(matrix.shape, self.bits_of(matrix.name), self.scheme)

    def _frozen(self, matrix: Matrix, bias: Tensor | None, device: torch.device) -> FrozenLinear:
        bits = self.bits_of(matrix.name)
        if self.kept is not None and self._quantizes(matrix):
            held = {key: value.to(device) for key, value in kept(self.kept, matrix.name).items()}
            return hold(held, matrix.shape, bias, bits, self.scheme, self.dtype)
        return freeze(self.rows(matrix).to(device), bias, bits, self.scheme, self.dtype, matrix.name)


class LoraPipelineLayer(PipelineLayer):
    """One part of an adapted model. Its only parameters that are trained, and named, are its adapters'."""

    def __init__(self, part: Part, lora_model: LoraModel, device: torch.device) -> None:
        nn.Module.__init__(self)
        self.part, self.bf16, self.device_type = part, False, device.type  # the type is the base's: no autocast
        made = []
        for name in part.names:
            module = lora_model.fill(lora_model.skeleton.get_submodule(name), name, device)
            lora_model.skeleton.set_submodule(name, module)
            made.append(module)
        self.parts = nn.ModuleList(made)

    def parameters_by_name(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name of the adapted layer + .A or .B, parameter)."""
        for prefix, module in zip(self.part.names, self.parts, strict=True):
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    yield f"{prefix}.{name}", parameter
