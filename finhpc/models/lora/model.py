"""A LoRA model: a base on disk, frozen and perhaps quantized, with adapters on its linear layers.

Each stage reads only its own weights, one at a time, and quantizes each before it reads the next: memory is the
quantized stage and one layer.
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

from finhpc.errors import ConfigError
from finhpc.lowrank.layers import LowRankLinear
from finhpc.models.derived import DerivedWeights
from finhpc.models.families.parts import BLOCKS, Compiled, Part, as_it_is
from finhpc.models.families.registry import skeleton
from finhpc.models.files.weights import Weights
from finhpc.models.initialize import fill_buffers
from finhpc.models.lora.layers import DoraLinear, FrozenLowRankLinear, LoraLinear
from finhpc.models.lora.quantized_cache import QuantizedCache
from finhpc.models.lora.start import read_start
from finhpc.models.lora.targets import (
    CHANGES_BASE,
    initial_factors,
    linear_layers,
    linear_shape,
    scale_of,
    scheme_of,
    target_shapes,
)
from finhpc.models.packed_parts import packed_parts, without_dropout
from finhpc.models.pipeline import PipelineLayer, stage_borders
from finhpc.quantization.frozen import FrozenLinear
from finhpc.quantization.schemes import SCHEMES, freeze, is_quantized
from finhpc.settings.finetune import FinetuneConfig, FinetuneQuantization, Lora
from finhpc.settings.training import Recompute

HEAD_ROWS = 1 / 16  # assumed share of a pack's rows that predict a token, for estimated costs


@dataclass(frozen=True)
class Matrix:
    """A frozen matrix of `shape` (out, in): of a linear layer, or a factor of a low-rank one.

    `stored`: its name in the model, which stores it as (in, out) if `transposed`.
    """

    name: str
    shape: tuple[int, int]
    stored: str
    transposed: bool = False


def matrices_of(module: nn.Module, name: str) -> list[Matrix]:
    """Return the matrices of a linear layer in the order they are multiplied by; none for other modules."""
    shape = linear_shape(module)
    if shape is None:
        return []
    if isinstance(module, LowRankLinear):
        return [
            Matrix(f"{name}.A", (module.A.out_features, shape[1]), f"{name}.A.weight"),
            Matrix(f"{name}.B", (shape[0], module.rank), f"{name}.B.weight"),
        ]
    return [Matrix(name, shape, f"{name}.weight", isinstance(module, Conv1D))]


@dataclass
class LoraModel:
    """What finetuning trains: `weights` of the base, adapters as in `lora`, the base's bits and type.

    `bf16`: the base and all activations are bfloat16, else float32; adapters are always float32. `cache`: a folder
    with the base's matrices already quantized, see `finhpc.models.lora.quantized_cache`. Raises `ConfigError` for
    settings that do not fit the model.
    """

    weights: Weights
    lora: Lora
    quantization: FinetuneQuantization
    bf16: bool = False
    recompute: Recompute = "none"
    seed: int = 0
    cache: Path | None = None

    def __post_init__(self) -> None:
        self.scheme = scheme_of(self.quantization)
        bits = self.quantization.bits
        self.targets = target_shapes(self.weights.skeleton, self.lora, bits)
        self.start = read_start(self.lora, self.weights.skeleton, set(self.targets), bits, self.scheme)
        self.parts()

    @classmethod
    def of(cls, config: FinetuneConfig, weights: Weights, cache: Path | None = None) -> LoraModel:
        train = config.train
        bf16 = train.precision == "bf16"
        return cls(weights, config.lora, config.quantization, bf16, train.recompute, train.seed, cache)

    @property
    def hf_config(self) -> Any:
        return self.weights.config

    @property
    def adapter_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter of the adapters, by the name that the engine gives it."""
        rank = self.lora.rank
        shapes: dict[str, tuple[int, ...]] = {}
        for name, (out, into) in self.targets.items():
            shapes |= {f"{name}.A": (rank, into), f"{name}.B": (out, rank)}
            if self.lora.dora:
                shapes[f"{name}.magnitude"] = (out,)
        return shapes

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float32

    @property
    def layer_class(self) -> type[LoraPipelineLayer]:
        """The pipeline layer of a part, made as `layer_class(part, self, device)`."""
        return LoraPipelineLayer

    def parts(self, compiled: Compiled = as_it_is) -> list[Part]:
        return packed_parts(self.hf_config, self.recompute, compiled)

    @cached_property
    def skeleton(self) -> nn.Module:
        """The model whose modules the layers take over, on the meta device until then."""
        without_dropout(config := type(self.hf_config).from_dict(self.hf_config.to_dict()))
        return skeleton(config)

    def borders(self, stages: int) -> list[int]:
        """Cut the model into stages by the multiplications of its frozen weights, forward and backward.

        The head is computed only for rows that predict a token.
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
        """Return the module with its weights, frozen, and with adapters; linear layers are replaced."""
        linear = linear_layers(module)
        for sub_name, sub in list(module.named_modules()):
            full = f"{name}.{sub_name}" if sub_name else name
            if sub_name in linear:
                frozen = self._linear(sub, full, device)
                if not sub_name:
                    return frozen
                module.set_submodule(sub_name, frozen)
            elif sub_name.rpartition(".")[0] not in linear:  # else a factor of a layer that was replaced
                for key, parameter in list(sub.named_parameters(recurse=False)):
                    if parameter.is_meta:
                        value = self.weights.read(f"{full}.{key}").to(device, self.dtype)
                        setattr(sub, key, nn.Parameter(value, requires_grad=False))
                for key, buffer in list(sub.named_buffers(recurse=False)):
                    sub._buffers[key] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
        fill_buffers(self.skeleton, module)
        return module

    def _linear(self, module: nn.Module, name: str, device: torch.device) -> nn.Module:
        base: FrozenLinear | FrozenLowRankLinear
        factors = None
        owner, owner_name = (module.B, f"{name}.B") if isinstance(module, LowRankLinear) else (module, name)
        bias = (
            None
            if getattr(owner, "bias", None) is None
            else self.weights.read(f"{owner_name}.bias").to(device, self.dtype)
        )
        first, *second = matrices_of(module, name)
        if isinstance(module, LowRankLinear):
            pair = self._frozen(first, None, device), self._frozen(second[0], bias, device)
            base = FrozenLowRankLinear(*pair, module.between, module.blocks)
        elif name in self.targets and self.lora.init in CHANGES_BASE:  # never quantized
            rows = self.rows(first).to(device)
            factors = initial_factors(self.lora, self.targets[name], self.seed, name, rows)
            base = freeze(rows - scale_of(self.lora) * factors[1] @ factors[0], bias, 16, "", self.dtype, name)
        else:
            base = self._frozen(first, bias, device)
        if name not in self.targets:
            return base
        if self.lora.init == "loftq" and self._quantizes(first):
            assert isinstance(base, FrozenLinear)
            factors = self._of_rounding(first, base)
        if self.start is not None:
            a, b = self.start.pairs[name]
            factors = a.clone(), b.clone()
        a, b = factors or initial_factors(self.lora, self.targets[name], self.seed, name)
        a, b = a.to(device, torch.float32), b.to(device, torch.float32)
        scale, dropout = scale_of(self.lora), self.lora.dropout
        if not self.lora.dora:
            return LoraLinear(base, a, b, scale, dropout)
        assert isinstance(base, FrozenLinear)
        adapted = DoraLinear(base, a, b, scale, dropout, self.dtype)
        if self.start is not None:
            adapted.magnitude.data.copy_(self.start.magnitudes[name])
        return adapted

    def _of_rounding(self, matrix: Matrix, frozen: FrozenLinear) -> tuple[Tensor, Tensor]:
        """Return A and B that make up for what quantizing a matrix lost."""
        stored = frozen.matrix(torch.float32)
        rows = self.rows(matrix).to(stored.device, torch.float32)
        lost = rows - stored
        if lost.norm() <= 1e-6 * rows.norm():
            raise ConfigError(
                f"lora.init=loftq has nothing to start from: quantization.bits={self.quantization.bits} changes "
                f"nothing of {matrix.name}; use lora.init=default."
            )
        return initial_factors(self.lora, matrix.shape, self.seed, matrix.name, lost)

    # -- the base's matrices ----------------------------------------------------------------

    def quantized_matrices(self) -> list[Matrix]:
        """Return the matrices of the base that are quantized, in the model's order; none at 16 bits."""
        layers = linear_layers(self.weights.skeleton).items()
        return [matrix for name, module in layers for matrix in matrices_of(module, name) if self._quantizes(matrix)]

    def rows(self, matrix: Matrix) -> Tensor:
        """Read a matrix (out, in) in float32."""
        stored = self.weights.read(matrix.stored)
        return stored.T if matrix.transposed else stored

    def bits_of(self, name: str) -> int:
        """Return the bits of a linear layer's weights: like bitsandbytes and peft, the head stays in float."""
        return 16 if name.partition(".")[0] == self.weights.family.head else self.quantization.bits

    def _quantizes(self, matrix: Matrix) -> bool:
        return is_quantized(matrix.shape, self.bits_of(matrix.name), self.scheme)

    @cached_property
    def _cache(self) -> QuantizedCache | None:
        return QuantizedCache(self.cache) if self.cache is not None else None

    def _frozen(self, matrix: Matrix, bias: Tensor | None, device: torch.device) -> FrozenLinear:
        bits = self.bits_of(matrix.name)
        if self._cache is not None and self._quantizes(matrix):
            tensors = {key: tensor.to(device) for key, tensor in self._cache.read(matrix.name).items()}
            return SCHEMES[self.scheme].frozen(tensors, matrix.shape, bias, bits)
        return freeze(self.rows(matrix).to(device), bias, bits, self.scheme, self.dtype, matrix.name)


class LoraPipelineLayer(PipelineLayer):
    """One part of a LoRA model. Only its adapters have trained, named parameters."""

    def __init__(self, part: Part, lora_model: LoraModel, device: torch.device) -> None:
        nn.Module.__init__(self)
        self.part, self.autocast, self.device_type = part, False, device.type  # the base has its own type
        modules = []
        for name in part.names:
            module = lora_model.fill(lora_model.skeleton.get_submodule(name), name, device)
            lora_model.skeleton.set_submodule(name, module)
            modules.append(module)
        self.part_modules = nn.ModuleList(modules)
        self.derived = DerivedWeights(self.part_modules, "bf16" if lora_model.bf16 else "fp32")  # adapters are float32

    def parameters_by_name(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (name of the adapted layer + .A or .B, parameter)."""
        for prefix, module in zip(self.part.names, self.part_modules, strict=True):
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    yield f"{prefix}.{name}", parameter
