"""`finhpc export`: a trained model as a folder for others, low-rank or merged, in 16, 8 or 4 bits.

    native   low-rank as it is; `AutoModelForCausalLM.from_pretrained` opens it after `import finhpc`
    merged   B A multiplied out, in transformers' own architecture; opened without finhpc

The folder of an adapter is exported as its base with the adapter in its weights (`finhpc.models.lora.peft_format`).
Weights are read, converted and written a layer at a time: memory is one layer and one file
(`finhpc.models.files.tensor_folder.FILE_BYTES`).
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from finhpc.errors import ConfigError, NonFiniteError
from finhpc.lowrank.layers import LowRankEmbedding, LowRankLinear
from finhpc.lowrank.replace import dense_shape
from finhpc.models.families.registry import as_dense, family_of, is_low_rank, model_sizes, skeleton
from finhpc.models.files.config import is_adapter
from finhpc.models.files.manifest import check_manifest
from finhpc.models.files.tensor_folder import GENERATION, TOKENIZER_FILES, FolderWriter, copy_tokenizer, has_tokenizer
from finhpc.models.files.tokenizer import find_tokenizer, save_tokenizer
from finhpc.models.files.tokens import check_rows, generation_config, stop_ids, write_stops
from finhpc.models.files.weights import Weights, locate, open_weights
from finhpc.models.lora.adapter_file import base_of, check_base, load_adapter
from finhpc.models.pipeline import is_tied
from finhpc.quantization.fake import TRAINED, trained_bits
from finhpc.quantization.per_vector import rounded
from finhpc.quantization.schemes import SCHEMES
from finhpc.settings.export import ExportConfig

log = logging.getLogger(__name__)

Tensors = dict[str, Tensor]


def export(config: ExportConfig, dry_run: bool = False) -> dict[str, Any]:
    """Write the model folder `config.out` from the one in `config.model`; returns what result.json holds.

    With `dry_run` everything but the weights is checked, and nothing is written. Raises `ConfigError`
    for settings and folders that cannot work, `CheckpointError` for damaged weights, `NonFiniteError`
    naming the layer that holds NaN.
    """
    begin = time.monotonic()
    _check(config)
    source, out = locate(config.model), _path(config.out)
    adapter = source if is_adapter(source) else None
    base = base_of(source) if adapter else source
    if adapter:
        check_base(adapter, base)
    conversion = Conversion(config, open_weights(base, low_rank=True, floats=True), adapter)
    tokenizer = find_tokenizer(adapter) if adapter else None
    if tokenizer is None:
        tokenizer = find_tokenizer(base)
    if tokenizer is not None:
        check_rows(tokenizer, conversion.source_config.vocab_size, f"model={source}")
    generation_config(source)  # raises if an adapter's own is damaged
    result = _counted(config, conversion) | {"model": str(source), "out": str(out)}
    if dry_run:
        _summary(result | {"status": "dry_run"})
        return result | {"status": "dry_run"}
    if base.is_dir():
        check_manifest(base)
    with FolderWriter(out) as writer:
        for tensors in conversion.layers():
            writer.add(tensors)
        size = writer.finish(conversion.target_config)
        save_tokenizer(base, writer.partial)
        if adapter:
            _replace_tokenizer(adapter, writer.partial)
        if tokenizer is not None:
            write_stops(writer.partial, stop_ids(tokenizer), conversion.source_config)
        result |= {"status": "finished", "size_bytes": size, "wall_s": time.monotonic() - begin}
        result["size_ratio"] = 2 * result["params_dense"] / size
        (writer.partial / "result.json").write_text(json.dumps(result, indent=1) + "\n")
        writer.publish()
    _summary(result)
    return result


class Conversion:
    """What becomes of each layer of a model. `target_config`: transformers' config of what comes out.

    `adapter`: a folder whose adapter goes into the weights.
    """

    def __init__(self, config: ExportConfig, weights: Weights, adapter: Path | None = None) -> None:
        self.weights, self.source_config = weights, weights.config
        source_config = weights.config
        self.merged, self.bits = config.format == "merged", config.quantization.bits
        self.scheme = SCHEMES[config.quantization.scheme] if self.bits < 16 else None
        self.dtype: torch.dtype | None = None if config.dtype == "auto" else getattr(torch, config.dtype)
        self.model = skeleton(source_config)
        self.adapter = load_adapter(adapter, self.model) if adapter else None
        if adapter and is_low_rank(source_config) and not self.merged:
            raise ConfigError(
                f"format=native does not fit model={adapter}, an adapter of a low-rank model: its B A would have to "
                "grow by the adapter's rank; use --format merged."
            )
        self._check_mergeable()
        self.tied = is_tied(source_config)
        self.trained = trained_bits(source_config)
        # Weights that were trained rounded are the rounded ones. The same quantizer rounds them anyway, unless an
        # adapter is added to them first.
        self.rounds = self.adapter is None and self.trained == self.bits and config.quantization.scheme == "minmax"
        self.kept = self._kept()
        self.target_config = self._target_config()
        target = skeleton(as_dense(source_config)) if self.merged else self.model
        # Stored as (in, out), unless quantised: bitsandbytes and we put linear layers in their place.
        self.turned = {name for name, module in target.named_modules() if isinstance(module, Conv1D)}

    def _check_mergeable(self) -> None:
        linear = all(module.mergeable for module in self.model.modules() if isinstance(module, LowRankLinear))
        if self.merged and not linear:
            raise ConfigError(
                f"format=merged does not fit a model of method.kind={self.source_config.low_rank_kind}: something "
                "stands between A and B, so that no one matrix takes their place; use --format native."
            )

    def layers(self) -> Iterator[Tensors]:
        """The tensors of one layer after the other, by their names in the new folder."""
        for name, module in self.model.named_modules():
            keys = [key for key, _ in module.named_parameters(recurse=False)]
            if keys and not (self.tied and name == "lm_head"):
                yield self._convert(name, module, {key: self._read(f"{name}.{key}") for key in keys})

    def _convert(self, name: str, module: nn.Module, held: Tensors) -> Tensors:
        bias, dtype = held.get("bias"), self.dtype or next(iter(held.values())).dtype
        embedding = isinstance(module, nn.Embedding | LowRankEmbedding)
        if isinstance(module, LowRankLinear | LowRankEmbedding):
            stays = not self.merged
            a, b = self._used(held["A"], stays), self._used(held["B"], stays)
            if self.merged:
                a, b = self._beside(f"{name}.A", a, embedding), self._beside(f"{name}.B", b, embedding)
                rows = self._adapted(name, module.product(a.float(), b.float()), embedding)
                return self._store(name, rows, bias, embedding, dtype)
            if self.scheme:  # modules of their own, see FactorLinear
                return self._store(f"{name}.A", a, None, embedding, dtype) | self._store(
                    f"{name}.B", b, bias, False, dtype
                )
            return self._named(name, held | {"A": a, "B": b}, dtype)
        if dense_shape(module) is not None:
            weight = held["weight"]
            rows = self._used(weight.T if isinstance(module, Conv1D) else weight)
            rows = self._beside(name, rows, embedding)
            return self._store(name, self._adapted(name, rows, embedding), bias, embedding, dtype)
        return self._named(name, held, dtype)

    def _beside(self, name: str, rows: Tensor, embedding: bool) -> Tensor:
        """A matrix as it was when the adapter was trained."""
        return rows if self.adapter is None or embedding else self.adapter.rounded(name, rows)

    def _adapted(self, name: str, rows: Tensor, embedding: bool) -> Tensor:
        return rows if self.adapter is None or embedding else self.adapter.merged(name, rows)

    def _store(self, name: str, rows: Tensor, bias: Tensor | None, embedding: bool, dtype: torch.dtype) -> Tensors:
        """A matrix (out, in), or (tokens, dim), as the target keeps it, and the bias."""
        rest = {} if bias is None else self._named(name, {"bias": bias}, dtype)
        if self.scheme and name not in self.kept:
            found = self.scheme.tensors(rows, self.bits, name)
            return {f"{name}.{key}": value for key, value in found.items()} | rest
        return self._named(name, {"weight": rows.T if name in self.turned else rows}, dtype) | rest

    def _named(self, name: str, tensors: Tensors, dtype: torch.dtype) -> Tensors:
        cast = {f"{name}.{key}": tensor.to(dtype) for key, tensor in tensors.items()}
        for key, tensor in cast.items():
            if dtype == torch.float16 and not torch.isfinite(tensor).all():
                raise ConfigError(f"{key} holds weights beyond dtype=float16's 65504; use bfloat16 or float32.")
        return cast

    def _used(self, rows: Tensor, stays: bool = True) -> Tensor:
        """The matrix that the model computes with. `stays`: the new model keeps it, and quantises it as it says."""
        if self.trained == 16 or (stays and self.rounds):
            return rows
        return rounded(rows.float(), self.trained)

    def _read(self, name: str) -> Tensor:
        tensor = self.weights.raw(name)
        if not torch.isfinite(tensor).all():
            raise NonFiniteError(
                f"{name} in {self.weights.path} holds NaN or infinity; export a model from before that happened."
            )
        return tensor

    def _kept(self) -> list[str]:
        """Names of the matrices that stay floats, because the scheme cannot quantise them."""
        scheme = self.scheme
        if scheme is None:
            return []
        found = [matrix for name, module in self.model.named_modules() for matrix in self._matrices(name, module)]
        kept = [
            name
            for name, rows, columns, embedding in found
            if (embedding and not scheme.embeddings) or not scheme.fits(rows, columns)
        ]
        if len(kept) == len(found):
            raise ConfigError(
                "quantization.scheme=nf4 quantises matrices whose sides are multiples of 32, and this model has none; "
                "use quantization.scheme=minmax."
            )
        return kept

    def _matrices(self, name: str, module: nn.Module) -> list[tuple[str, int, int, bool]]:
        """Name, rows, columns of the matrices that a layer has in the new model, and whether each is an embedding."""
        if self.tied and name == "lm_head":
            return []
        embedding = isinstance(module, nn.Embedding | LowRankEmbedding)
        if isinstance(module, LowRankLinear | LowRankEmbedding) and not self.merged:
            a, b = module.A.shape, module.B.shape
            return [(f"{name}.A", *a, embedding), (f"{name}.B", *b, False)]
        if isinstance(module, LowRankLinear):
            return [(name, module.out_features, module.in_features, False)]
        if isinstance(module, LowRankEmbedding):
            return [(name, module.num_embeddings, module.embedding_dim, True)]
        shape = dense_shape(module)
        return [] if shape is None else [(name, *(shape[::-1] if embedding else shape), embedding)]

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
            if native:
                target.factor_modules = True
            target.quantization_config = self.scheme.config(
                self.bits, [*self.kept, *(["lm_head"] if self.tied else [])]
            )
        return target


def _check(config: ExportConfig) -> None:
    problems = []
    bits, scheme = config.quantization.bits, config.quantization.scheme
    if not config.model:
        problems.append("model is not set; give --model with a model folder (a run's `model` folder).")
    if not config.out:
        problems.append("out is not set; give --out with a folder for the exported model.")
    elif os.path.lexists(out := _path(config.out)) and not (out.is_dir() and not any(out.iterdir())):
        problems.append(f"out={out} exists already, and nothing is overwritten; choose another --out, or remove it.")
    if bits == 16 and scheme != "minmax":
        problems.append(
            f"quantization.scheme={scheme} is set, but quantization.bits=16 quantises nothing; "
            f"use quantization.bits={SCHEMES[scheme].bits[0]}, or leave the scheme out."
        )
    elif bits < 16 and bits not in SCHEMES[scheme].bits:
        fits = ", ".join(name for name, known in SCHEMES.items() if bits in known.bits)
        problems.append(
            f"quantization.scheme={scheme} has {SCHEMES[scheme].bits[0]} bits, not quantization.bits={bits}; "
            f"use quantization.bits={SCHEMES[scheme].bits[0]}, or a scheme of {bits} bits: {fits}."
        )
    if problems:
        raise ConfigError(problems)


def _replace_tokenizer(adapter: Path, out: Path) -> None:
    """Put the adapter's own tokenizer and generation config, if it brings them, in the place of its base's."""
    if has_tokenizer(adapter):
        for pattern in TOKENIZER_FILES:
            for file in out.glob(pattern):
                file.unlink()
        copy_tokenizer(adapter, out)
    if (adapter / GENERATION).is_file():
        shutil.copyfile(adapter / GENERATION, out / GENERATION)


def _counted(config: ExportConfig, conversion: Conversion) -> dict[str, Any]:
    """Every key of the result, with what can be told without the weights; the rest is null."""
    source = conversion.source_config
    sizes = model_sizes(as_dense(source) if conversion.merged else source, source)
    quantised = conversion.scheme is not None
    return {
        "status": None,
        "model": None,
        "out": None,
        "format": config.format,
        "bits": config.quantization.bits,
        "scheme": config.quantization.scheme if quantised else None,
        "not_quantised": conversion.kept,  # matrices that the scheme leaves as they are
        "dtype": str(conversion.target_config.dtype).removeprefix("torch."),
        **sizes,
        "size_bytes": None,
        "size_ratio": None,  # the dense model in 16 bits over size_bytes
        "wall_s": None,
    }


def _summary(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    size = result["size_bytes"]
    weights = f"{result['bits']} bits, {result['scheme']}" if result["scheme"] else str(result["dtype"])
    table = Table(show_header=False, title=f"export {result['format']} {result['out']}")
    table.add_row("parameters", f"{result['params_total'] / 1e6:,.2f} M, dense {result['params_dense'] / 1e6:,.2f} M")
    table.add_row("weights", weights)
    if kept := result["not_quantised"]:
        table.add_row("matrices not quantised", f"{len(kept)}: {', '.join(kept[:4])}{', ...' if len(kept) > 4 else ''}")
    table.add_row("size on disk", "not written" if size is None else f"{size:,} bytes ({size / 1e9:.4f} GB)")
    if size is not None:
        table.add_row("against dense in 16 bits", f"{result['size_ratio']:.2f} x smaller")
        table.add_row("time", f"{result['wall_s']:.1f} s")
    Console(stderr=True).print(table)
    if result["status"] == "finished":
        needs = (
            "transformers" if result["format"] == "merged" and result["scheme"] != "minmax" else "import finhpc, then"
        )
        log.info(f"open it: {needs} AutoModelForCausalLM.from_pretrained({result['out']!r})")


def _path(text: str) -> Path:
    return Path(os.path.abspath(os.path.expanduser(text)))
