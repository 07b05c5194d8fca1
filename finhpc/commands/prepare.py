"""Text on disk -> token shards: `finhpc prepare`.

Parallel Ray tasks turn units of the source into files of ids in `out/.work`; then one process packs those, in order,
into shards. An interrupted run continues from the finished units. The manifest is written last, so that unfinished
shards never look finished.
"""

from __future__ import annotations

import json
import logging
import platform
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

import finhpc
from finhpc.cluster.connect import cluster_resources, ray_cluster
from finhpc.cluster.ready import check_ray
from finhpc.cluster.tasks import is_finished, run_tasks, workplace
from finhpc.data.shards.shards import FORMAT, MANIFEST, TOKENIZER, Manifest, dataset_fingerprint
from finhpc.data.text import sources
from finhpc.data.text.encoding import encode_unit, training_sample, unit_dropped, unit_file
from finhpc.data.text.formats import Unit
from finhpc.data.text.pack_shards import Packed, pack
from finhpc.data.text.tokenizer import Encoder, save, trained_size
from finhpc.errors import ConfigError, DataError
from finhpc.files import file_sha256, file_stamps, json_sha256, publish, write_atomic, write_json
from finhpc.screen import Progress, counted, summary_table
from finhpc.settings.prepare import PrepareConfig

log = logging.getLogger(__name__)

WORK = ".work"
RESULT = "result.json"


def prepare(config: PrepareConfig, dry_run: bool = False) -> dict[str, Any]:
    """Write token shards of `config.source` into `config.out` and return the content of result.json.

    Continues an interrupted run of the same settings, and returns the result of a finished one. `dry_run` checks and
    counts only. Raises `ConfigError` for settings and sources that cannot work, `DataError` for text that cannot be
    read, `UnfinishedError` if the machine fails, and `RunBusyError` if another process prepares the same folder.
    """
    began = time.monotonic()
    units, described = _checked_units(config)
    out = Path(config.out).expanduser().absolute()
    settings = settings_sha256(config, units)
    if is_finished(out, MANIFEST, settings, "shards", out / WORK):
        return _finished_result(out)
    for source in described:
        if ignored := source.get("ignored_files"):
            log.info(f"{source['source']}: skipped {counted(ignored, 'file')} of other formats")
    if dry_run:
        return _dry_run(out, config, units, described)
    check_ray()  # here, because an error inside the workplace would remove earlier work
    with _workplace(out, settings) as work:
        encoder = _tokenizer(work / TOKENIZER, units, config)
        dropped = _encode(units, config, work, encoder.slow_because is None)
        _remove_shards(out)
        packed = pack([unit_file(work, i) for i in range(len(units))], out, config, encoder.vocab_size)
        packed.dropped |= dropped
        result = _finish(out, work, config, packed, encoder, described, settings, began)
    _summary(result)
    return result


def _checked_units(config: PrepareConfig) -> tuple[list[Unit], list[dict[str, Any]]]:
    """Return the units of the sources and their description. Raises one `ConfigError` with every problem."""
    problems = [] if config.out else ["out is not set; give --out with a folder for the shards."]
    units, described = list[Unit](), list[dict[str, Any]]()
    try:
        trained_size(config.tokenizer)
    except ConfigError as error:
        problems += error.problems
    try:
        units, described = sources.units(config)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    return units, described


def settings_sha256(config: PrepareConfig, units: list[Unit]) -> str:
    """Return one hash of all that the shards depend on: settings, and the size and time of every input file."""
    names = sorted({path for unit in units for path in unit.paths})  # names of hub data sets are not files
    settings = config.model_dump(exclude={"out", "workers", "source"})
    tokenizer = Path(config.tokenizer) / "tokenizer.json"
    settings["tokenizer_sha256"] = file_sha256(tokenizer) if tokenizer.is_file() else None
    pieces = [[unit.kind, unit.paths, unit.start, unit.stop, unit.name] for unit in units]
    return json_sha256([FORMAT, settings, file_stamps([Path(name) for name in names]), pieces])


def _finished_result(out: Path) -> dict[str, Any]:
    stored = out / RESULT
    manifest = Manifest.model_validate_json((out / MANIFEST).read_bytes())
    return json.loads(stored.read_bytes()) if stored.is_file() else _result(out, manifest, None)


def _dry_run(out: Path, config: PrepareConfig, units: list[Unit], described: list[dict[str, Any]]) -> dict[str, Any]:
    vocab_size = trained_size(config.tokenizer)
    if vocab_size is None:
        with TemporaryDirectory() as folder:
            save(config.tokenizer, Path(folder) / TOKENIZER, lambda: iter(()))
            vocab_size = Encoder(Path(folder) / TOKENIZER).vocab_size
    size = sum(unit.size for unit in units) if all(unit.size for unit in units) else None
    result: dict[str, Any] = {
        "status": "dry_run",
        "out": str(out),
        "source": described,
        "files": len({path for unit in units for path in unit.paths}),
        "bytes": size,
        "units": len(units),
        "vocab_size": vocab_size,
        "tokens": None,  # known only after tokenizing
    }
    amount = "unknown size" if size is None else f"{size / 1e6:,.1f} MB"
    files, parts = counted(result["files"], "file"), counted(len(units), "unit")
    log.info(f"dry run: {files}, {amount}, in {parts} -> {out}; nothing was written")
    return result


@contextmanager
def _workplace(out: Path, settings: str) -> Iterator[Path]:
    """Yield `out/.work`, locked; text or settings that cannot work leave nothing behind."""
    is_new = not out.exists()
    try:
        with workplace(out / WORK, out, settings):
            yield out / WORK
    except (ConfigError, DataError):
        _remove_shards(out)
        if is_new:
            with suppress(OSError):
                out.rmdir()
        raise


def _remove_shards(out: Path) -> None:
    for stale in [*out.glob("train-*.parquet"), *out.glob("val-*.parquet")]:
        stale.unlink()


def _tokenizer(folder: Path, units: list[Unit], config: PrepareConfig) -> Encoder:
    if not folder.is_dir():
        if trained_size(config.tokenizer) is not None:
            log.info(f"training the tokenizer {config.tokenizer}")
        partial_folder = folder.with_name(".tokenizer.partial")
        save(config.tokenizer, partial_folder, lambda: training_sample(units, config))
        publish(partial_folder, folder)
    encoder = Encoder(folder)
    if encoder.slow_because:
        log.info(f"tokenizer {config.tokenizer}: Hugging Face's code, slower than tiktoken: {encoder.slow_because}")
    return encoder


def _encode(units: list[Unit], config: PrepareConfig, work: Path, tiktoken: bool) -> dict[str, int]:
    """Encode every unit that has no file yet, in parallel; return how many documents all units dropped, by reason."""
    pending = [(index, unit) for index, unit in enumerate(units) if not unit_file(work, index).is_file()]
    if len(pending) < len(units):
        log.info(f"continuing: {len(units) - len(pending)} of {len(units)} units are done")
    sized = all(unit.size for _, unit in pending)
    if pending:
        total = sum(unit.size if sized else 1 for _, unit in pending)
        with ray_cluster(config.workers), Progress("tokenizing", total, None if sized else "units") as progress:
            # Twice as many as there are cores, so that a core that ends one can start the next at once.
            width = config.workers or 2 * int(cluster_resources().get("CPU", 1))
            task = partial(_encode_unit, config=config, work=work, tiktoken=tiktoken)
            for (_, unit), _ in run_tasks(task, pending, lambda item: str(item[1]), width):
                progress.advance(unit.size if sized else 1)
    dropped = Counter[str]()
    for index in range(len(units)):
        dropped.update(unit_dropped(unit_file(work, index)))
    return dict(dropped)


def _encode_unit(item: tuple[int, Unit], config: PrepareConfig, work: Path, tiktoken: bool) -> None:
    index, unit = item
    encode_unit(unit, config, work / TOKENIZER, unit_file(work, index), tiktoken)


def _finish(
    out: Path,
    work: Path,
    config: PrepareConfig,
    packed: Packed,
    encoder: Encoder,
    described: list[dict[str, Any]],
    settings: str,
    began: float,
) -> dict[str, Any]:
    """Write tokenizer, manifest and result, in that order, and remove the working files."""
    shutil.rmtree(out / TOKENIZER, ignore_errors=True)
    shutil.copytree(work / TOKENIZER, out / TOKENIZER, copy_function=shutil.copyfile)
    sha256 = file_sha256(out / TOKENIZER / "tokenizer.json")
    shards = [shard for split in packed.splits.values() for shard in split]
    versions = {name: version(name) for name in ("pyarrow", "tokenizers", "tiktoken")}
    versions |= {"finhpc": finhpc.__version__, "python": platform.python_version()}
    manifest = Manifest(
        block_len=config.block_len,
        vocab_size=encoder.vocab_size,
        eot_id=encoder.eot_id,
        dtype="uint16" if encoder.dtype == np.uint16 else "uint32",
        tokenizer_sha256=sha256,
        fingerprint=dataset_fingerprint(shards, sha256, config.block_len),
        splits=packed.splits,
        counts=packed.counts,
        dropped=packed.dropped,
        val_unigram_entropy_nats=packed.val_unigram_entropy_nats,
        source=described,
        settings=config.model_dump(mode="json", exclude={"out", "workers"}),
        settings_sha256=settings,
        versions=versions,
    )
    write_atomic(out / MANIFEST, manifest.model_dump_json(indent=1) + "\n")
    result = _result(out, manifest, time.monotonic() - began)
    write_json(out / RESULT, result)
    shutil.rmtree(work)
    return result


def _result(out: Path, manifest: Manifest, wall_s: float | None) -> dict[str, Any]:
    train, val = manifest.counts["train"], manifest.counts["val"]
    tokens = train.tokens + val.tokens
    return {
        "status": "done",
        "out": str(out),
        "documents": train.documents + val.documents,
        "documents_val": val.documents,
        "bytes": train.bytes + val.bytes,
        "tokens": tokens,
        "tokens_val": val.tokens,
        "dropped": manifest.dropped,
        "shards": sum(map(len, manifest.splits.values())),
        "shard_bytes": sum(shard.bytes for split in manifest.splits.values() for shard in split),
        "block_len": manifest.block_len,
        "vocab_size": manifest.vocab_size,
        "val_unigram_entropy_nats": manifest.val_unigram_entropy_nats,
        "fingerprint": manifest.fingerprint,
        "tokenizer_sha256": manifest.tokenizer_sha256,
        "wall_s": wall_s,
        "tokens_per_s": tokens / wall_s if wall_s else None,
    }


def _summary(result: dict[str, Any]) -> None:
    dropped = ", ".join(f"{name} {count:,}" for name, count in result["dropped"].items() if count)
    rows = [
        ("out", result["out"]),
        ("documents", f"{result['documents']:,} ({result['documents_val']:,} held out)"),
        ("text", f"{result['bytes'] / 1e6:,.1f} MB"),
        ("tokens", f"{result['tokens']:,} ({result['tokens_val']:,} held out)"),
        ("dropped", dropped or "nothing"),
        ("vocabulary", f"{result['vocab_size']:,}"),
        ("held-out unigram entropy", f"{result['val_unigram_entropy_nats']:.3f} nats per token"),
        ("shards", f"{result['shards']:,} files, {result['shard_bytes'] / 1e6:,.1f} MB"),
        ("time", f"{result['wall_s']:.1f} s, {result['tokens_per_s']:,.0f} tokens/s"),
    ]
    summary_table("prepare", rows)
