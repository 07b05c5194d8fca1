"""`finhpc bench prepare`: preparing text, compared with `datasets.map` and the fast tokenizer on the same documents.

Measured in turn, each in a fresh process:

- finhpc: the whole job of `finhpc prepare`, from JSON lines to verified shards, Ray already up
- datasets.map: ids alone, `map(batched, batch_size=100, num_proc=workers)`, its JSON read before the measurement
- finhpc, a tenth: the same job on a tenth of the text, for the memory

and tiktoken alone on one core, from texts in memory, which is the limit of one core. All ids of finhpc and
datasets.map are compared.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from finhpc.bench import memory
from finhpc.bench.corpus import write_salted
from finhpc.bench.report import Row, publish
from finhpc.bench.settings import PrepareBench
from finhpc.bench.timing import in_turn, median_ratio, spread
from finhpc.data.text import sources
from finhpc.data.text.encoding import training_sample
from finhpc.data.text.tokenizer import Encoder, save, trained_size
from finhpc.errors import DataError
from finhpc.settings.prepare import PrepareConfig

log = logging.getLogger(__name__)

USUAL_TOKENS_PER_S = 350_000  # of datasets.map with two processes, to say beforehand how long it takes
FINHPC, PLAIN, TENTH, ALONE = "finhpc", "datasets.map", "finhpc, a tenth", "tiktoken, one core"


@dataclass
class Measured:
    """One pass. `memory_before`, `memory_peak`: bytes of its process tree before the measurement and at most."""

    wall_s: float
    tokens: int
    documents: int
    memory_before: int
    memory_peak: int


@dataclass
class Workshop:
    """Temporary folder of a measurement: the corpora, the tokenizer, and the output of each pass."""

    folder: Path
    settings: PrepareBench
    workers: int
    tokenizer: str = ""
    passes: dict[str, list[Measured]] = field(default_factory=dict)

    def measure(self, name: str) -> float:
        """Run one of the ways once more; returns its seconds."""
        log.info(f"{name} ...")
        measured = _run(*self._way(name))
        self.passes.setdefault(name, []).append(measured)
        log.info(f"{name}: {measured.wall_s:.1f} s, {measured.tokens / measured.wall_s:,.0f} tokens/s")
        return measured.wall_s

    def _way(self, name: str) -> tuple[str, dict[str, Any]]:
        saved, out = str(self.folder / "tokenizer"), self.folder / name.replace(" ", "-")
        shutil.rmtree(out, ignore_errors=True)
        corpus = str(self.folder / ("tenth" if name in (TENTH, ALONE) else "corpus"))
        given = {"corpus": corpus, "workers": self.workers, "out": str(out)}
        if name == PLAIN:
            return PLAIN, given | {"tokenizer": saved, "shards": str(self.folder / FINHPC)}
        if name == ALONE:
            return "tiktoken", {"corpus": corpus, "tokenizer": saved}
        shape = {"block_len": self.settings.block_len, "val_fraction": self.settings.val_fraction}
        return FINHPC, given | {"tokenizer": self.tokenizer, "shape": shape}


def bench_prepare(settings: PrepareBench) -> dict[str, Any]:
    """Measure and publish; `ratios`: `prepare_over_datasets_map` (tokens/s), `prepare_memory_10x_over_1x`.

    Raises `DataError` if finhpc's ids are not those of `datasets.map`, `ConfigError` if the source or tokenizer
    cannot be used.
    """
    began = time.perf_counter()
    out = Path(os.path.abspath(os.path.expanduser(settings.bench.out)))
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="prepare-", dir=out) as folder:
        shop = Workshop(Path(folder), settings, settings.workers or os.cpu_count() or 1)
        slow_because = _furnish(shop)
        each = settings.tokens / USUAL_TOKENS_PER_S * 2 / shop.workers
        log.info(f"{settings.bench.repeats} rounds, of which datasets.map takes about {each:,.0f} s each")
        if slow_because is None:
            shop.measure(ALONE)
        ways: dict[str, Callable[[], float]] = {
            FINHPC: lambda: shop.measure(FINHPC),
            PLAIN: lambda: shop.measure(PLAIN),
            TENTH: lambda: shop.measure(TENTH),
        }
        walls = in_turn(ways, settings.bench.repeats)
    passes = shop.passes

    def peaks(name: str) -> list[float]:
        return [float(measured.memory_peak) for measured in passes[name]]

    ratios = {
        # The same documents and ids: tokens/s over tokens/s is seconds over seconds.
        "prepare_over_datasets_map": median_ratio(walls[PLAIN], walls[FINHPC]),
        "prepare_memory_10x_over_1x": median_ratio(peaks(FINHPC), peaks(TENTH)),
    }
    rows = [_row(name, passes[name]) for name in (FINHPC, PLAIN, TENTH, ALONE) if name in passes]
    return publish("prepare", str(out), _conditions(shop, slow_because), rows, ratios, began)


def _furnish(shop: Workshop) -> str | None:
    """Write tokenizer and corpora; returns the reason if tiktoken cannot do the work."""
    settings = shop.settings
    config = PrepareConfig(source=settings.source, tokenizer=settings.tokenizer, val_fraction=settings.val_fraction)
    saved = shop.folder / "tokenizer"
    save(settings.tokenizer, saved, lambda: training_sample(sources.units(config)[0], config))
    # A trained one would be trained anew on every corpus.
    shop.tokenizer = settings.tokenizer if trained_size(settings.tokenizer) is None else str(saved)
    encoder = Encoder(saved)
    for name, tokens in (("corpus", settings.tokens), ("tenth", settings.tokens // 10)):
        log.info(f"writing {tokens:,} tokens of salted text")
        write_salted(shop.folder / name, settings.source, encoder, tokens)
    return encoder.slow_because


def _run(way: str, arguments: dict[str, Any]) -> Measured:
    """Run a way in its own process, sampling its memory from "ready" until its figures are there."""
    # As from a shell: a Ray of its own, and the tokenizers' default threads.
    env = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "TOKENIZERS_PARALLELISM")}
    command = [sys.executable, "-m", "finhpc.bench.plain.prepare", json.dumps([way, arguments])]
    with (
        tempfile.TemporaryFile("w+") as stderr,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=env) as process,
    ):
        assert process.stdout is not None
        try:
            process.stdout.readline()
            with memory.PeakMemory(process.pid) as peak:
                figures = process.stdout.readline()
            rest = process.stdout.readline()
            failed = process.wait() != 0 or not figures
        except BaseException:
            process.terminate()
            raise
        if failed:
            stderr.seek(0)
            raise DataError(f"{way} failed, so there is nothing to compare; its last output:\n{stderr.read()[-2000:]}")
    if rest and not json.loads(rest)["identical"]:
        raise DataError("the ids of finhpc are not those of datasets.map; this is a bug of finhpc: please report it.")
    return Measured(**json.loads(figures), memory_before=peak.first, memory_peak=peak.peak)


def _row(name: str, passes: list[Measured]) -> Row:
    walls = [measured.wall_s for measured in passes]
    return {
        "way": name,
        "documents": passes[0].documents,
        "tokens": passes[0].tokens,
        "wall_s": statistics.median(walls),
        "tokens_per_s": statistics.median(measured.tokens / measured.wall_s for measured in passes),
        "spread": spread(walls),
        "memory_before_bytes": int(statistics.median(measured.memory_before for measured in passes)),
        "peak_memory_bytes": int(statistics.median(measured.memory_peak for measured in passes)),
    }


def _conditions(shop: Workshop, slow_because: str | None) -> Row:
    import ray

    return {
        "source": " ".join(shop.settings.source) + ", copies salted so that documents differ",
        "tokenizer": shop.settings.tokenizer,
        "encoded_by": f"Hugging Face ({slow_because})" if slow_because else "tiktoken",
        "workers": shop.workers,
        "ray": f"{ray.__version__}, started before the measurement, but not its task processes",
        "threads": "one per task; datasets.map: its default",
        "datasets_map_batch_size": 100,
        "datasets_map_json": "read before the measurement",
        "ids": "identical, except the last ones of each split, which fill no block",
        "memory": memory.HOW,
        "repeats": shop.settings.bench.repeats,
        "versions": ", ".join(f"{name} {version(name)}" for name in ("datasets", "tokenizers", "tiktoken")),
    }
