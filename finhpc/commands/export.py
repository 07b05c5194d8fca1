"""`finhpc export`: a trained model as a folder for others, low-rank or merged, in 16, 8 or 4 bits.

    native   low-rank as it is; `AutoModelForCausalLM.from_pretrained` opens it after `import finhpc`
    merged   B A multiplied out, in transformers' own architecture; opened without finhpc
    adapter  the mean of several adapters, or an adapter of a lower rank, in peft's format
    others   for another runtime than transformers, see `finhpc.models.export.formats`

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
from pathlib import Path
from typing import Any, Literal

from finhpc.errors import ConfigError, collect
from finhpc.generation.adapters import read_adapters
from finhpc.lowrank.registry import SLTRAIN
from finhpc.models.export.conversion import Conversion
from finhpc.models.export.formats import RUNTIMES
from finhpc.models.export.runtime import Source
from finhpc.models.families.registry import as_dense, model_sizes
from finhpc.models.files.config import is_adapter
from finhpc.models.files.manifest import check_manifest, weights_fingerprint
from finhpc.models.files.source import config_of, copy_tokenizer, find_tokenizer, locate, open_weights
from finhpc.models.files.tensor_folder import TensorFolderWriter
from finhpc.models.files.tokenizer import TOKENIZER_FILES, has_tokenizer, save_tokenizer
from finhpc.models.files.tokens import GENERATION, check_rows, generation_config, stop_ids, write_stops
from finhpc.models.lora.adapter_file import base_of
from finhpc.models.lora.average import lower_rank, read_mean, write_adapter
from finhpc.quantization.schemes import SCHEMES, check_scheme
from finhpc.screen import summary_table
from finhpc.settings.export import ExportConfig

log = logging.getLogger(__name__)


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
    runtime, surroundings = RUNTIMES.get(config.format), _source(config, source, base, tokenizer, conversion)
    result = _counts(config, conversion) | {"model": str(source), "out": str(out)}
    if runtime:
        floats = runtime.check(conversion, surroundings)
        result |= {"not_quantised": floats, "scheme": runtime.schemes.get(config.quantization.bits)}
        result["adapters"] = list(surroundings.adapters)
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
            if runtime:
                size = runtime.write(conversion, surroundings, writer.partial)
            elif added is not None and config.format == "adapter":
                size = write_adapter(writer.partial, added, weights, weights_fingerprint(base))
            else:
                for tensors in conversion.layers():
                    writer.add(tensors)
                size = writer.finish(conversion.target_config)
            if runtime is None or runtime.needs_tokenizer_files:
                _write_tokenizer(base, adapter, writer.partial, surroundings)
            result |= {"status": "finished", "size_bytes": size, "wall_s": time.monotonic() - begin}
            result["size_ratio"] = 2 * result["params_dense"] / size
            (writer.partial / "result.json").write_text(json.dumps(result, indent=1) + "\n")
            writer.publish()
    except OSError as error:
        raise ConfigError(f"out={out} cannot be written ({error.strerror}); choose another --out.") from None
    _summary(result)
    return result


def _source(config: ExportConfig, path: Path, base: Path, tokenizer: Any, conversion: Conversion) -> Source:
    """Return what surrounds the weights; raises `ConfigError` for an adapter of another base."""
    own = generation_config(path)
    stops = [] if tokenizer is None else stop_ids(tokenizer, own, conversion.source_config)
    adapters = read_adapters(config.adapters, conversion.source_config, base) if config.adapters else {}
    name = next(part for part in reversed(path.with_suffix("").parts) if part != "model")
    return Source(name, config.quantization.bits, tokenizer, stops, adapters)


def scored_format(model: Path) -> Literal["native", "merged"]:
    """Return the format in which a quantized model is scored: native unless that has none."""
    kind = getattr(config_of(model, any_family=True), "low_rank_kind", None)
    return "merged" if kind == SLTRAIN else "native"


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
    files = [name for name, runtime in RUNTIMES.items() if runtime.adapters]
    if config.adapters and config.format not in files:
        problems.append(
            f"adapters is for format={' and '.join(files)}; leave it out, or give an adapter's folder as --model to "
            "add it to the weights."
        )
    if config.format in RUNTIMES and scheme != "minmax":
        problems.append(
            f"quantization.scheme={scheme} does not fit format={config.format}, whose runtime has schemes of its own "
            f"({', '.join(RUNTIMES[config.format].schemes.values())}); leave it out."
        )
    if problems:
        raise ConfigError(problems)


def _check_adapter(config: ExportConfig, adapter: Path | None) -> None:
    """Raise `ConfigError` for settings of adapters that do not fit the model or each other."""
    problems = []
    if adapter is not None and config.adapters:
        problems.append(
            f"adapters is for a base, and model={config.model} is an adapter itself; give its base as model."
        )
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


def _write_tokenizer(base: Path, adapter: Path | None, out: Path, source: Source) -> None:
    """Write tokenizer and generation config of an exported model."""
    copy_tokenizer(base, out)
    if adapter:
        _replace_tokenizer(adapter, out)
    if source.tokenizer is not None:
        write_stops(out, stop_ids(source.tokenizer), config_of(base))


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
        "adapters": [],  # written as files of their own
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
    if result["status"] == "finished" and (runtime := RUNTIMES.get(result["format"])):
        log.info(f"open it: {runtime.opens}")
    elif result["status"] == "finished":
        needs = (
            "transformers" if result["format"] == "merged" and result["scheme"] != "minmax" else "import finhpc, then"
        )
        if result["format"] == "adapter":
            log.info(f"open it: peft's PeftModel.from_pretrained(BASE, {result['out']!r})")
            return
        log.info(f"open it: {needs} AutoModelForCausalLM.from_pretrained({result['out']!r})")


def _path(text: str) -> Path:
    return Path(os.path.abspath(os.path.expanduser(text)))
