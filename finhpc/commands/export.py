"""`finhpc export`: a trained model as a folder for others, low-rank or merged, in 16, 8 or 4 bits.

    native   low-rank as it is; `AutoModelForCausalLM.from_pretrained` opens it after `import finhpc`
    merged   B A multiplied out, in transformers' own architecture; opened without finhpc
    adapter  the mean of several adapters, or an adapter of a lower rank, in peft's format

An adapter's folder is exported as its base with the adapter in its weights (`finhpc.models.lora.peft_format`). Weights
are read, converted and written a layer at a time: memory is one layer and one file
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
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from finhpc.errors import ConfigError, NonFiniteError, collect
from finhpc.lowrank.layers import LowRankEmbedding, LowRankLinear, is_factor
from finhpc.lowrank.registry import SLTRAIN
from finhpc.lowrank.replace import dense_shape
from finhpc.lowrank.sltrain import SparseLinear
from finhpc.models.families.registry import as_dense, family_of, is_low_rank, model_sizes, skeleton
from finhpc.models.files.config import is_adapter
from finhpc.models.files.manifest import check_manifest, weights_fingerprint
from finhpc.models.files.source import config_of, copy_tokenizer, find_tokenizer, locate, open_weights
from finhpc.models.files.tensor_folder import TensorFolderWriter
from finhpc.models.files.tokenizer import TOKENIZER_FILES, has_tokenizer, save_tokenizer
from finhpc.models.files.tokens import GENERATION, check_rows, generation_config, stop_ids, write_stops
from finhpc.models.files.weights import Weights
from finhpc.models.lora.adapter_file import base_of
from finhpc.models.lora.average import lower_rank, read_mean, write_adapter
from finhpc.models.lora.peft_format import Adapter
from finhpc.models.pipeline import is_tied
from finhpc.quantization.fake import TRAINED, trained_bits
from finhpc.quantization.per_vector import rounded
from finhpc.quantization.schemes import SCHEMES, check_scheme
from finhpc.screen import summary_table
from finhpc.settings.export import ExportConfig

log = logging.getLogger(__name__)

Tensors = dict[str, Tensor]


def export(config: ExportConfig, dry_run: bool = False) -> dict[str, Any]:
    """Write the model folder `config.out` from the one in `config.model`; returns the content of result.json.

    With `dry_run` everything except the weights is checked, and nothing is written. Raises `ConfigError` for settings
    and folders that cannot work, `CheckpointError` for damaged weights, `NonFiniteError` naming the layer with NaN.
    """
    begin = time.monotonic()
    _check(config)
    source, out = locate(config.model), _path(config.out)
    adapter = source if is_adapter(source) else None
    _check_adapter(config, adapter)
    base = base_of(source) if adapter else source
    weights = open_weights(base, low_rank=True, floats=True)
    added = read_mean([adapter, *map(Path, config.average)], base, weights.skeleton) if adapter else None
    if added is not None and config.rank is not None:
        added = lower_rank(added, config.rank)
    conversion = Conversion(config, weights, added)
    tokenizer = find_tokenizer(adapter) if adapter else None
    if tokenizer is None:
        tokenizer = find_tokenizer(base)
    if tokenizer is not None:
        check_rows(tokenizer, conversion.source_config.vocab_size, f"model={source}")
    generation_config(source)  # raises if an adapter's own is damaged
    result = _counts(config, conversion) | {"model": str(source), "out": str(out)}
    if added is not None and config.format == "adapter":
        total = sum(a.numel() + b.numel() for a, b in added.pairs.values())
        result |= {"params_total": total, "compression_ratio": result["params_dense"] / total, "dtype": "float32"}
    if dry_run:
        _summary(result | {"status": "dry_run"})
        return result | {"status": "dry_run"}
    if base.is_dir():
        check_manifest(base)
    try:
        with TensorFolderWriter(out) as writer:
            if added is not None and config.format == "adapter":
                size = write_adapter(writer.partial, added, weights, weights_fingerprint(base))
            else:
                for tensors in conversion.layers():
                    writer.add(tensors)
                size = writer.finish(conversion.target_config)
            copy_tokenizer(base, writer.partial)
            if adapter:
                _replace_tokenizer(adapter, writer.partial)
            if tokenizer is not None:
                write_stops(writer.partial, stop_ids(tokenizer), conversion.source_config)
            result |= {"status": "finished", "size_bytes": size, "wall_s": time.monotonic() - begin}
            result["size_ratio"] = 2 * result["params_dense"] / size
            (writer.partial / "result.json").write_text(json.dumps(result, indent=1) + "\n")
            writer.publish()
    except OSError as error:
        raise ConfigError(f"out={out} cannot be written ({error.strerror}); choose another --out.") from None
    _summary(result)
    return result


def scored_format(model: Path) -> Literal["native", "merged"]:
    """Return the format in which a quantized model is scored: native unless that has none."""
    kind = getattr(config_of(model, any_family=True), "low_rank_kind", None)
    return "merged" if kind == SLTRAIN else "native"


class Conversion:
    """How each layer of a model is converted. `target_config`: transformers' config of the exported model.

    `adapter`: is added to the weights.
    """

    def __init__(self, config: ExportConfig, weights: Weights, adapter: Adapter | None = None) -> None:
        self.weights, self.source_config = weights, weights.config
        self.merged, self.bits = config.format == "merged", config.quantization.bits
        self.scheme = SCHEMES[config.quantization.scheme] if self.bits < 16 else None
        self.dtype: torch.dtype | None = None if config.dtype == "auto" else getattr(torch, config.dtype)
        self.model = skeleton(self.source_config)
        self.adapter = adapter
        if adapter and is_low_rank(self.source_config) and config.format == "native":
            raise ConfigError(
                f"format=native does not fit model={config.model}, an adapter of a low-rank model: its B A would have "
                "to grow by the adapter's rank; use --format merged."
            )
        mergeable = all(module.mergeable for module in self.model.modules() if isinstance(module, LowRankLinear))
        sparse = any(isinstance(module, SparseLinear) for module in self.model.modules())
        if self.merged and not mergeable:
            raise ConfigError(
                f"format=merged does not fit a model of method.kind={self.source_config.low_rank_kind}: something "
                "stands between A and B, so that no one matrix takes their place; use --format native."
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
        target = skeleton(as_dense(self.source_config)) if self.merged else self.model
        self.unquantized = self._unquantized(target, config.quantization.scheme)
        self.target_config = self._target_config()
        # Stored as (in, out), unless quantized: quantizers replace these by linear layers.
        self.transposed = {name for name, module in target.named_modules() if isinstance(module, Conv1D)}

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


def _check(config: ExportConfig) -> None:
    problems: list[str] = []
    bits, scheme = config.quantization.bits, config.quantization.scheme
    if not config.model:
        problems.append("model is not set; give --model with a model folder (a run's `model` folder).")
    if not config.out:
        problems.append("out is not set; give --out with a folder for the exported model.")
    elif os.path.lexists(out := _path(config.out)) and not (out.is_dir() and not any(out.iterdir())):
        problems.append(f"out={out} exists already, and nothing is overwritten; choose another --out, or remove it.")
    with collect(problems):
        check_scheme(bits, scheme)
        if bits == 16 and scheme != "minmax":
            raise ConfigError(
                f"quantization.scheme={scheme} is set, but quantization.bits=16 quantizes nothing; "
                f"use quantization.bits={SCHEMES[scheme].bits[0]}, or leave the scheme out."
            )
    if problems:
        raise ConfigError(problems)


def _check_adapter(config: ExportConfig, adapter: Path | None) -> None:
    """Raise `ConfigError` for settings of adapters that do not fit the model or each other."""
    problems = []
    if adapter is None and (config.average or config.format == "adapter" or config.rank is not None):
        problems.append(
            f"model={config.model} is no adapter, which average, rank and format=adapter need; give the folder of one."
        )
    if config.format == "adapter" and not config.average and config.rank is None:
        problems.append(
            "format=adapter would copy the adapter; give others with --average, or a lower --rank, or --format merged."
        )
    if config.rank is not None and config.format != "adapter":
        problems.append(f"rank={config.rank} is of an exported adapter; use --format adapter, or leave it out.")
    if config.format == "adapter" and (config.quantization.bits < 16 or config.dtype not in ("auto", "float32")):
        problems.append("format=adapter writes float32; leave dtype and quantization.bits out.")
    if problems:
        raise ConfigError(problems)


def _replace_tokenizer(adapter: Path, out: Path) -> None:
    """Replace the base's tokenizer and generation config by the adapter's own, if it has them."""
    if has_tokenizer(adapter):
        for pattern in TOKENIZER_FILES:
            for file in out.glob(pattern):
                file.unlink()
        save_tokenizer(adapter, out)
    elif (adapter / GENERATION).is_file():
        shutil.copyfile(adapter / GENERATION, out / GENERATION)


def _counts(config: ExportConfig, conversion: Conversion) -> dict[str, Any]:
    """Return every key of the result, with the values that need no weights; the rest is null."""
    source = conversion.source_config
    sizes = model_sizes(as_dense(source) if conversion.merged else source, source)
    return {
        "status": None,
        "model": None,
        "out": None,
        "format": config.format,
        "bits": config.quantization.bits,
        "scheme": config.quantization.scheme if conversion.scheme else None,
        "not_quantised": conversion.unquantized,  # matrices that the scheme leaves in float
        "dtype": str(conversion.target_config.dtype).removeprefix("torch."),
        **sizes,
        "size_bytes": None,
        "size_ratio": None,  # size of the dense model in 16 bits over size_bytes
        "wall_s": None,
    }


def _summary(result: dict[str, Any]) -> None:
    size = result["size_bytes"]
    weights = f"{result['bits']} bits, {result['scheme']}" if result["scheme"] else str(result["dtype"])
    parameters = f"{result['params_total'] / 1e6:,.2f} M, dense {result['params_dense'] / 1e6:,.2f} M"
    rows = [("out", str(result["out"])), ("parameters", parameters), ("weights", weights)]
    if floats := result["not_quantised"]:
        more = ", ..." if len(floats) > 4 else ""
        rows.append(("matrices not quantized", f"{len(floats)}: {', '.join(floats[:4])}{more}"))
    rows.append(("size on disk", "not written" if size is None else f"{size:,} bytes ({size / 1e9:.4f} GB)"))
    if size is not None:
        rows.append(("compared with dense in 16 bits", f"{result['size_ratio']:.2f} x smaller"))
        rows.append(("time", f"{result['wall_s']:.1f} s"))
    summary_table(f"export {result['format']}", rows)
    if result["status"] == "finished":
        needs = (
            "transformers" if result["format"] == "merged" and result["scheme"] != "minmax" else "import finhpc, then"
        )
        if result["format"] == "adapter":
            log.info(f"open it: peft's PeftModel.from_pretrained(BASE, {result['out']!r})")
            return
        log.info(f"open it: {needs} AutoModelForCausalLM.from_pretrained({result['out']!r})")


def _path(text: str) -> Path:
    return Path(os.path.abspath(os.path.expanduser(text)))
