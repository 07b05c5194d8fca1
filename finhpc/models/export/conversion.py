"""How each layer of a model is converted for an export."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from finhpc.errors import ConfigError, NonFiniteError
from finhpc.lowrank.layers import LowRankEmbedding, LowRankLinear, is_factor
from finhpc.lowrank.registry import SLTRAIN
from finhpc.lowrank.replace import dense_shape
from finhpc.lowrank.sltrain import SparseLinear
from finhpc.models.export.formats import RUNTIMES
from finhpc.models.families.registry import as_dense, family_of, is_low_rank, skeleton
from finhpc.models.files.weights import Weights
from finhpc.models.lora.peft_format import Adapter
from finhpc.models.pipeline import is_tied
from finhpc.quantization.fake import TRAINED, trained_bits
from finhpc.quantization.per_vector import rounded
from finhpc.quantization.schemes import SCHEMES
from finhpc.settings.export import ExportConfig

Tensors = dict[str, Tensor]


class Conversion:
    """How each layer of a model is converted. `target_config`: transformers' config of the exported model.

    `adapter`: is added to the weights.
    """

    def __init__(self, config: ExportConfig, weights: Weights, adapter: Adapter | None = None) -> None:
        self.weights, self.source_config = weights, weights.config
        runtime = RUNTIMES.get(config.format)
        self.merged = config.format == "merged" or (runtime is not None and runtime.merged)
        self.bits = 16 if runtime else config.quantization.bits  # a runtime quantizes in a way of its own
        self.scheme = SCHEMES[config.quantization.scheme] if self.bits < 16 else None
        self.dtype: torch.dtype | None = None if config.dtype == "auto" else getattr(torch, config.dtype)
        if runtime and config.quantization.bits < 16:
            self.dtype = torch.float32  # what is rounded must not have been rounded before
        self.model = skeleton(self.source_config)
        self.adapter = adapter
        if adapter and is_low_rank(self.source_config) and not self.merged:
            raise ConfigError(
                f"format={config.format} does not fit model={config.model}, an adapter of a low-rank model: its B A "
                "would have to grow by the adapter's rank; use --format merged."
            )
        kinds = {type(module) for module in self.model.modules() if isinstance(module, LowRankLinear)}
        mergeable = all(kind.mergeable for kind in kinds)
        sparse = any(isinstance(module, SparseLinear) for module in self.model.modules())
        if self.merged and not mergeable:
            raise ConfigError(
                f"format={config.format} does not fit a model of method.kind={self.source_config.low_rank_kind}: "
                "something stands between A and B, so that no one matrix takes their place; use --format "
                f"{' or '.join(_unmerged(kinds))}."
            )
        if sparse and self.bits < 16 and not self.merged:
            raise ConfigError(
                f"format=native with quantization.bits={self.bits} does not fit a model of method.kind={SLTRAIN}: the "
                "entries of S are not a matrix with vectors to round; use --format merged."
            )
        self.tied = is_tied(self.source_config)
        self.trained_bits = trained_bits(self.source_config)
        # Weights that were trained rounded are used rounded. The same quantizer rounds them anyway, unless an adapter
        # is added to them first.
        same_bits = self.trained_bits == self.bits and config.quantization.scheme == "minmax"
        self.quantizer_rounds = self.adapter is None and same_bits
        self.target = skeleton(as_dense(self.source_config)) if self.merged else self.model
        self.unquantized = self._unquantized(self.target, config.quantization.scheme)
        self.target_config = self._target_config()
        # Stored as (in, out), unless quantized: quantizers replace these by linear layers.
        self.transposed = {name for name, module in self.target.named_modules() if isinstance(module, Conv1D)}

    @property
    def stored_dtype(self) -> torch.dtype:
        """The type of weights that are not quantized."""
        if self.dtype is not None:
            return self.dtype
        return self.weights.raw(next(name for name, p in self.model.named_parameters() if p.dim() == 1)).dtype

    def layers(self) -> Iterator[Tensors]:
        """Yield the tensors of one layer after the other, by their names in the exported model."""
        for name, module in self._modules():
            tensors = {key: self._read(f"{name}.{key}") for key, _ in module.named_parameters()}
            yield self._convert(name, module, tensors)

    def _modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the modules that have parameters, a low-rank layer as one module, a tied head not at all."""
        for name, module in self.model.named_modules():
            own = any(True for _ in module.parameters(recurse=False)) and not is_factor(self.model, name)
            tied_head = self.tied and name == self.weights.family.head
            if (own or isinstance(module, LowRankLinear | LowRankEmbedding)) and not tied_head:
                yield name, module

    def _convert(self, name: str, module: nn.Module, tensors: Tensors) -> Tensors:
        dtype = self.dtype or next(iter(tensors.values())).dtype
        embedding = isinstance(module, nn.Embedding | LowRankEmbedding)
        if isinstance(module, LowRankLinear | LowRankEmbedding):
            bias, stays = tensors.get("B.bias"), not self.merged
            own = {"S": tensors["S"]} if isinstance(module, SparseLinear) else {}
            a, b = (self._used(tensors[f"{key}.weight"], stays) for key in ("A", "B"))
            if stays:
                stored = self._store(f"{name}.A", a, None, embedding, dtype)
                return stored | self._store(f"{name}.B", b, bias, False, dtype) | self._cast(name, own, dtype)
            a, b = self._as_trained(f"{name}.A", a, embedding), self._as_trained(f"{name}.B", b, embedding)
            rows = module.product(a.float(), b.float(), *(s.float() for s in own.values()))
            rows = self._adapted(name, rows, embedding)
            return self._store(name, rows, bias, embedding, dtype)
        if dense_shape(module) is not None:
            weight = tensors["weight"]
            rows = self._used(weight.T if isinstance(module, Conv1D) else weight, name not in self.unquantized)
            rows = self._adapted(name, self._as_trained(name, rows, embedding), embedding)
            return self._store(name, rows, tensors.get("bias"), embedding, dtype)
        return self._cast(name, tensors, dtype)

    def _as_trained(self, name: str, rows: Tensor, embedding: bool) -> Tensor:
        """Return a matrix as it was when the adapter was trained."""
        return rows if self.adapter is None or embedding else self.adapter.rounded(name, rows)

    def _adapted(self, name: str, rows: Tensor, embedding: bool) -> Tensor:
        return rows if self.adapter is None or embedding else self.adapter.merged(name, rows)

    def _used(self, rows: Tensor, stays: bool = True) -> Tensor:
        """Return the matrix that the model computes with. `stays`: the quantizer of the export takes this matrix."""
        if self.trained_bits == 16 or (stays and self.quantizer_rounds):
            return rows
        return rounded(rows.float(), self.trained_bits)

    def _store(self, name: str, rows: Tensor, bias: Tensor | None, embedding: bool, dtype: torch.dtype) -> Tensors:
        """Return a matrix (out, in), or (tokens, dim), and its bias as the exported model stores them."""
        rest = {} if bias is None else self._cast(name, {"bias": bias}, dtype)
        if self.scheme and name not in self.unquantized:
            quantized = self.scheme.tensors(rows, self.bits, name)
            return {f"{name}.{key}": value for key, value in quantized.items()} | rest
        return self._cast(name, {"weight": rows.T if name in self.transposed else rows}, dtype) | rest

    def _cast(self, name: str, tensors: Tensors, dtype: torch.dtype) -> Tensors:
        cast = {f"{name}.{key}": tensor.to(dtype) for key, tensor in tensors.items()}
        for key, tensor in cast.items():
            if dtype == torch.float16 and not torch.isfinite(tensor).all():
                raise ConfigError(f"{key} holds weights beyond dtype=float16's 65504; use bfloat16 or float32.")
        return cast

    def _read(self, name: str) -> Tensor:
        tensor = self.weights.raw(name)
        if not torch.isfinite(tensor).all():
            raise NonFiniteError(
                f"{name} in {self.weights.path} holds NaN or infinity; export a model from before that happened."
            )
        return tensor

    def _unquantized(self, target: nn.Module, scheme_name: str) -> list[str]:
        """Return the names of the exported matrices that stay floats, because the scheme cannot quantize them."""
        scheme, floats, count = self.scheme, [], 0
        if scheme is None:
            return []
        for name, module in target.named_modules():
            shape, embedding = dense_shape(module), isinstance(module, nn.Embedding)
            if shape is None or (self.tied and name == self.weights.family.head):
                continue
            count += 1
            rows, columns = shape[::-1] if embedding else shape
            looks_up = scheme.embeddings and type(module) is nn.Embedding  # and does not scale as well
            if (embedding and not looks_up) or not scheme.fits(rows, columns):
                floats.append(name)
        if len(floats) == count:
            raise ConfigError(
                f"quantization.scheme={scheme_name} quantizes {scheme.needs}, and this model has none; "
                "use quantization.scheme=minmax."
            )
        return floats

    def _target_config(self) -> Any:
        target = as_dense(self.source_config) if self.merged else deepcopy(self.source_config)
        if hasattr(target, TRAINED):
            delattr(target, TRAINED)
        family = family_of(target)
        native = is_low_rank(self.source_config) and not self.merged
        target.architectures = [(family.low_rank_class if native else family.dense_class).__name__]
        if self.dtype:
            target.dtype = str(self.dtype).removeprefix("torch.")
        if self.scheme:
            tied_head = [family.head] if self.tied else []
            target.quantization_config = self.scheme.config(self.bits, [*self.unquantized, *tied_head])
        return target


def _unmerged(kinds: set[type[LowRankLinear]]) -> list[str]:
    """Return the formats in which low-rank layers of these kinds are written as they are."""
    return ["native", *(name for name, runtime in RUNTIMES.items() if kinds and kinds <= {*runtime.layers})]
