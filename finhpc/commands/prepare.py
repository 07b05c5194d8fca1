"""Text on disk -> token shards: `finhpc prepare`.

Two phases. Parallel Ray tasks turn units of the source into files of ids under `out/.work`;
then one process packs those, in order, into shards. Finished units are kept, so an interrupted run
continues; the manifest comes last, so it never looks finished.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import platform
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

import numpy as np

from finhpc.cluster.own_ray import keep_token_private, own_ray
from finhpc.cluster.package import Driver
from finhpc.cluster.ready import check_ray
from finhpc.data.shards.shards import FORMAT, MANIFEST, TOKENIZER, Manifest, dataset_fingerprint, file_sha256
from finhpc.data.text import sources
from finhpc.data.text.encoding import encode_unit, training_sample, unit_dropped, unit_file
from finhpc.data.text.pack_shards import Packed, pack
from finhpc.data.text.tokenizer import Encoder, save, trained_size
from finhpc.data.text.unit import Unit
from finhpc.errors import ConfigError, DataError, FinhpcError, RunBusyError
from finhpc.files import private_folder, publish, write_atomic
from finhpc.interrupts import terminable
from finhpc.screen import Progress
from finhpc.settings.prepare import PrepareConfig

log = logging.getLogger(__name__)

WORK = ".work"
RESULT = "result.json"


class UnfinishedError(DataError):
    """The machine failed, not the text: what is done is kept, and the same command goes on."""


def prepare(config: PrepareConfig, dry_run: bool = False) -> dict[str, Any]:
    """Write shards of `config.source` into `config.out`; returns what result.json holds.

    Continues an interrupted run of the same settings, and only reports where it is already done.
    Starts a local Ray where none runs. With `dry_run` it checks and counts, and starts and writes
    nothing. Raises `ConfigError` for settings and sources that cannot work, `DataError` for text that
    cannot be read, `RunBusyError` where another process prepares the same folder.
    """
    began = time.monotonic()
    if not config.out:
        raise ConfigError("out is not set; give --out with a folder for the shards.")
    trained_size(config.tokenizer)
    out = Path(config.out).expanduser().absolute()
    units, described = sources.units(config)
    settings = settings_sha256(config, units)
    if (done := _finished(out, settings)) is not None:
        return done
    for source in described:
        if ignored := source.get("ignored_files"):
            log.info(f"{source['source']}: not read, {ignored:,} files of other formats")
    if dry_run:
        return _dry(out, config, units, described)
    check_ray()
    with _workplace(out, settings) as work:
        encoder = _tokenizer(work / TOKENIZER, units, config)
        dropped = _encode(units, config, work, encoder.slow_because is None)
        _remove_shards(out)
        packed = pack([unit_file(work, i) for i in range(len(units))], out, config, encoder.vocab_size)
        packed.dropped |= dropped
        result = _finish(out, work, config, packed, encoder, described, settings, began)
    _summary(result)
    return result


def settings_sha256(config: PrepareConfig, units: list[Unit]) -> str:
    """One hash of everything the shards depend on: settings, and every input file's size and time of change."""
    names = sorted({path for unit in units for path in unit.paths})
    files = [(name, status.st_size, status.st_mtime_ns) for name in names if (status := _status(name))]
    kept = config.model_dump(exclude={"out", "workers", "source"})
    chosen = Path(config.tokenizer) / "tokenizer.json"
    kept["tokenizer_sha256"] = file_sha256(chosen) if chosen.is_file() else None
    pieces = [[unit.kind, unit.paths, unit.start, unit.stop, unit.name] for unit in units]
    return hashlib.sha256(json.dumps([FORMAT, kept, files, pieces]).encode()).hexdigest()


def _status(name: str) -> os.stat_result | None:
    """None where the name is not a file's: a data set of the hub."""
    return os.stat(name) if os.path.exists(name) else None


def _finished(out: Path, settings: str) -> dict[str, Any] | None:
    """The result of an earlier run with the same settings, if `out` holds it."""
    if not (out / MANIFEST).is_file():
        return None
    manifest = Manifest.model_validate_json((out / MANIFEST).read_bytes())
    if manifest.settings_sha256 != settings:
        raise ConfigError(
            f"out={out} already holds shards of other settings or another source ({MANIFEST} says which); "
            "choose another --out, or remove that folder."
        )
    log.info(f"{out} is already prepared with these settings; nothing to do")
    stored = out / RESULT
    return json.loads(stored.read_bytes()) if stored.is_file() else _result(out, manifest, None)


def _dry(out: Path, config: PrepareConfig, units: list[Unit], described: list[dict[str, Any]]) -> dict[str, Any]:
    """What a preparation would read and where it would write; tokens are known only after it."""
    _check_out(out)
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
        "tokens": None,
    }
    said = "unknown size" if size is None else f"{size / 1e6:,.1f} MB"
    log.info(f"dry run: {result['files']:,} files, {said}, in {len(units):,} units -> {out}; nothing was written")
    return result


def _check_out(out: Path) -> None:
    """Raise `ConfigError` for a folder that shards cannot be written to."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out={out} is a file; give a folder.")
    if out.is_dir() and not (out / WORK).is_dir() and any(out.iterdir()):
        raise ConfigError(f"out={out} holds other files; choose an empty or new folder.")
    try:
        TemporaryFile(dir=next(folder for folder in (out, *out.parents) if folder.exists())).close()
    except OSError as error:
        raise ConfigError(f"out={out} cannot be written ({error.strerror}); choose another --out.") from None


@contextmanager
def _workplace(out: Path, settings: str) -> Iterator[Path]:
    """`out/.work`, locked for this process, with what an earlier run of the same settings left there.

    Refused settings or text leave nothing: mending them makes it another run.
    """
    work, new = out / WORK, not out.exists()
    _check_out(out)
    try:
        private_folder(out)
        private_folder(work)
    except OSError as error:
        raise ConfigError(f"out={out} cannot be written ({error.strerror}); choose another --out.") from None
    with open(work / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunBusyError(f"out={out} is being prepared by another process; wait for it.") from None
        key = work / "settings"
        if key.is_file() and key.read_text() != settings:
            log.info(f"{out}: an unfinished run had other settings; what it left is discarded")
            for path in [path for path in work.iterdir() if path.name != "lock"]:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        write_atomic(key, settings.encode())
        try:
            yield work
        except (ConfigError, DataError) as error:
            if not isinstance(error, UnfinishedError):
                shutil.rmtree(work)
                _remove_shards(out)
                if new:
                    out.rmdir()
            raise


def _remove_shards(out: Path) -> None:
    for stale in [*out.glob("train-*.parquet"), *out.glob("val-*.parquet")]:
        stale.unlink()


def _tokenizer(folder: Path, units: list[Unit], config: PrepareConfig) -> Encoder:
    if not folder.is_dir():
        if trained_size(config.tokenizer) is not None:
            log.info(f"training the tokeniser {config.tokenizer}")
        fresh = folder.with_name(".tokenizer.partial")
        save(config.tokenizer, fresh, lambda: training_sample(units, config))
        publish(fresh, folder)
    encoder = Encoder(folder)
    if encoder.slow_because:
        log.info(
            f"tokeniser {config.tokenizer}: by Hugging Face's code, slower than by tiktoken: {encoder.slow_because}"
        )
    return encoder


def _encode(units: list[Unit], config: PrepareConfig, work: Path, tiktoken: bool) -> dict[str, int]:
    """Phase 1: every unit that has no file yet, in parallel; returns what all units dropped."""
    pending = [index for index in range(len(units)) if not unit_file(work, index).is_file()]
    if len(pending) < len(units):
        log.info(f"continuing: {len(units) - len(pending)} of {len(units)} units are done")
    sized = all(units[index].size for index in pending)
    total = sum(units[index].size if sized else 1 for index in pending)
    if pending:
        with _ray(config), Progress("tokenising", total, bytes_=sized) as progress:
            for row in _run_tasks(pending, units, config, work, tiktoken):
                if row["error"]:
                    raise {"ConfigError": ConfigError, "DataError": DataError}.get(row["kind"], UnfinishedError)(
                        row["error"]
                    )
                progress.advance(units[row["index"]].size if sized else 1)
    dropped = Counter[str]()
    for index in range(len(units)):
        dropped.update(unit_dropped(unit_file(work, index)))
    return dict(dropped)


def _run_tasks(
    pending: list[int], units: list[Unit], config: PrepareConfig, work: Path, tiktoken: bool
) -> Iterator[dict[str, Any]]:
    """One row a unit, as soon as it is done."""
    import ray
    from ray.exceptions import RayError

    # Plain tasks, not Ray Data: units are short, and its scheduling left each core idle for a third of the time.
    task, driver = ray.remote(num_cpus=1)(_task), Driver.here()
    # Twice as many as there are cores, so that a core that ends one has the next at hand.
    width = config.workers or 2 * int(ray.cluster_resources().get("CPU", 1))
    waiting, running = iter(pending), dict[Any, int]()
    try:
        while True:
            for index in islice(waiting, width - len(running)):
                running[task.remote(index, units[index], config, work, tiktoken, driver)] = index
            if not running:
                return
            for done in ray.wait(list(running), num_returns=1)[0]:
                index = running.pop(done)
                try:
                    yield ray.get(done)
                except RayError as error:  # the task's process died, more often than Ray tries again
                    reason = str(error).strip().splitlines()[0].rstrip(".")
                    yield {"index": index, "error": _mend(units[index], type(error).__name__, reason), "kind": ""}
    finally:
        for left in running:
            ray.cancel(left)


def _task(index: int, unit: Unit, config: PrepareConfig, work: Path, tiktoken: bool, driver: Driver) -> dict[str, Any]:
    """Encode one unit; what goes wrong comes back as data, to be raised once and in our words."""
    error, kind = "", ""
    try:
        driver.enter()
        encode_unit(unit, config, work / TOKENIZER, unit_file(work, index), tiktoken)
    except FinhpcError as problem:
        error, kind = str(problem), type(problem).__name__
    except Exception as problem:  # a full disk, a file that vanished: named with its unit, not as a Ray traceback
        error = _mend(unit, type(problem).__name__, str(problem))
    return {"index": index, "error": error, "kind": kind}


def _mend(unit: Unit, kind: str, problem: str) -> str:
    return f"{unit}: {kind}: {problem}; mend that and run the same prepare again."


@contextmanager
def _ray(config: PrepareConfig) -> Iterator[None]:
    """The Ray that runs already, or a local one for as long as it is needed."""
    import ray

    if ray.is_initialized():
        yield
        return
    if not os.environ.get("RAY_ADDRESS"):
        with own_ray(config.workers or os.cpu_count() or 1):
            yield
        return
    keep_token_private()
    ray.init(log_to_driver=False, logging_level="ERROR")  # as in a submitted job
    try:
        with terminable():
            yield
    finally:
        ray.shutdown()


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
    """Tokeniser, manifest, result, in that order; then the working files go."""
    shutil.rmtree(out / TOKENIZER, ignore_errors=True)
    shutil.copytree(work / TOKENIZER, out / TOKENIZER, copy_function=shutil.copyfile)
    sha256 = file_sha256(out / TOKENIZER / "tokenizer.json")
    shards = [shard for split in packed.splits.values() for shard in split]
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
        versions=_versions(),
    )
    write_atomic(out / MANIFEST, manifest.model_dump_json(indent=1).encode() + b"\n")
    result = _result(out, manifest, time.monotonic() - began)
    write_atomic(out / RESULT, json.dumps(result, indent=1).encode() + b"\n")
    shutil.rmtree(work)
    return result


def _versions() -> dict[str, str]:
    import pyarrow
    import tiktoken
    import tokenizers

    import finhpc

    return {
        "finhpc": finhpc.__version__,
        "python": platform.python_version(),
        "pyarrow": pyarrow.__version__,
        "tokenizers": tokenizers.__version__,
        "tiktoken": tiktoken.__version__,
    }


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
    from rich.console import Console
    from rich.table import Table

    dropped = ", ".join(f"{name} {count:,}" for name, count in result["dropped"].items() if count)
    table = Table(show_header=False, title=f"prepared {result['out']}")
    table.add_row("documents", f"{result['documents']:,} ({result['documents_val']:,} held out)")
    table.add_row("text", f"{result['bytes'] / 1e6:,.1f} MB")
    table.add_row("tokens", f"{result['tokens']:,} ({result['tokens_val']:,} held out)")
    table.add_row("dropped", dropped or "nothing")
    table.add_row("vocabulary", f"{result['vocab_size']:,}")
    table.add_row("held-out unigram entropy", f"{result['val_unigram_entropy_nats']:.3f} nats a token")
    table.add_row("shards", f"{result['shards']:,} files, {result['shard_bytes'] / 1e6:,.1f} MB")
    table.add_row("time", f"{result['wall_s']:.1f} s, {result['tokens_per_s']:,.0f} tokens/s")
    Console(stderr=True).print(table)
