"""Part of `finhpc bench generate`: requests of mixed lengths, batched and not, by transformers too; cache layouts."""

from __future__ import annotations

import logging
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from finhpc.bench.plain.generate import Continued, continuous, padded
from finhpc.bench.report import Row
from finhpc.bench.settings import GenerateBench
from finhpc.bench.timing import in_turn, median_ratio, spread
from finhpc.generation.batching import BLOCK
from finhpc.generation.decode import PREFILL, passes
from finhpc.generation.decoder import Decoder
from finhpc.generation.paged import cache_bytes
from finhpc.generation.requests import Request
from finhpc.models.lora.multi_lora import Adapters
from finhpc.settings.generate import Sampling

log = logging.getLogger(__name__)

OURS = "batched"
SEEN = 256  # requests of a mix
# Mean tokens of prompts and of answers, Kwon et al. 2023, figure 11.
MIXES = {"ShareGPT": (161, 338), "Alpaca": (19, 58)}


def mixed_requests(settings: GenerateBench, names: Sequence[str | None], rows: int) -> list[Request]:
    """Return as many requests as `settings.requests`: prompts and answers of a quarter of the settings' lengths on."""
    draw, requests = random.Random(0), []
    for i in range(settings.requests):
        ids = [draw.randrange(rows) for _ in range(draw.randint(max(1, settings.prompt // 4), settings.prompt))]
        sampling = Sampling(max_new_tokens=draw.randint(max(1, settings.new // 4), settings.new))
        requests.append(Request(str(i), ids, names[i % len(names)], sampling))
    return requests


def batching(settings: GenerateBench, decoder: Decoder, adapters: Adapters) -> tuple[float, list[Row]]:
    """Tokens/s of mixed requests batched, over those one at a time."""
    requests = mixed_requests(settings, adapters.names, decoder.config.vocab_size)
    tokens = sum(request.sampling.max_new_tokens for request in requests)

    def measure(batch: int) -> float:
        begin = time.perf_counter()
        for _ in passes(decoder, requests, batch, adapters=adapters):
            pass
        return time.perf_counter() - begin

    log.info(f"{len(requests)} requests of mixed lengths, one at a time and batched")
    batches = list(dict.fromkeys((1, min(8, len(requests)), len(requests))))
    seconds = in_turn({str(batch): partial(measure, batch) for batch in batches}, settings.bench.repeats)
    rows: list[Row] = [
        {
            "at_once": int(batch),
            "requests": len(requests),
            "tokens_per_s": tokens / statistics.median(times),
            "over_one_at_a_time": median_ratio(seconds["1"], times),
            "spread": spread(times),
        }
        for batch, times in seconds.items()
    ]
    return float(rows[-1]["over_one_at_a_time"]), rows


def against_transformers(
    settings: GenerateBench, decoder: Decoder, adapters: Adapters
) -> tuple[dict[str, float], list[Row]]:
    """Tokens/s of mixed requests without adapters, which transformers cannot mix, over those of its two ways.

    `equal_ids`: requests with the ids of ours; with weights of 16 bits, rounding decides between ids that are about as
    likely. `cache_bytes`: of keys and values, in blocks or in rows of the longest.
    """
    requests = mixed_requests(settings, [None], decoder.config.vocab_size)
    prompts, new = [request.ids for request in requests], [request.sampling.max_new_tokens for request in requests]
    found: dict[str, Continued] = {}

    def ours(batch: int) -> Continued:
        begin, ids = time.perf_counter(), {request.name: list[int]() for request in requests}
        for tokens in passes(decoder, requests, batch):
            for token in tokens:
                ids[token.request] += [] if token.id is None else [token.id]
        return Continued(list(ids.values()), time.perf_counter() - begin, decoder.cache_bytes)

    ways: dict[str, Callable[[], Continued]] = {
        OURS: partial(ours, len(requests)),
        "one at a time": partial(ours, 1),
        "HF padded": partial(padded, decoder.model, prompts, new),
        "HF continuous": partial(continuous, decoder.model, prompts, new, BLOCK, PREFILL),
    }

    def measure(way: str) -> float:
        found[way] = ways[way]()
        return found[way].seconds

    log.info(f"{len(requests)} requests without adapters, by finhpc and by transformers")
    adapters.select([None])
    seconds = in_turn({way: partial(measure, way) for way in ways}, settings.bench.repeats)
    rows: list[Row] = [
        {
            "way": way,
            "requests": len(requests),
            "tokens_per_s": sum(new) / statistics.median(times),
            "ours_over_it": median_ratio(times, seconds[OURS]),
            "equal_ids": sum(map(list.__eq__, found[way].ids, found[OURS].ids)),
            "cache_bytes": found[way].cache_bytes,
            "spread": spread(times),
        }
        for way, times in seconds.items()
    ]
    ratios = {way: row["ours_over_it"] for way, row in zip(ways, rows, strict=True)}
    return {"over_hf_padded": ratios["HF padded"], "over_hf_continuous": ratios["HF continuous"]}, rows


def mixed_lengths(prompt: float, answer: float, context: int) -> list[tuple[int, int]]:
    """Return tokens now and at the end of `SEEN` requests at some moment, log-normal with these means."""
    draw, lengths = random.Random(0), list[tuple[int, int]]()
    while len(lengths) < SEEN:
        whole, new = (round(draw.lognormvariate(math.log(mean) - 0.5, 1)) for mean in (prompt, answer))
        if 0 < whole < whole + new <= context:
            lengths.append((whole + draw.randint(0, new), whole + new))
    return lengths


def layouts(settings: GenerateBench, decoder: Decoder) -> list[Row]:
    """Bytes of keys and values in each layout: of the mixed requests at their ends, and of `MIXES` at some moment."""
    requests = mixed_requests(settings, [None], decoder.config.vocab_size)
    cache: Any = decoder.make_cache(1, BLOCK)
    token = cache.token_bytes * decoder.config.num_hidden_layers
    ends = [len(request.ids) + request.sampling.max_new_tokens for request in requests]
    mixes = {"these": ([(end, end) for end in ends], settings.prompt + settings.new)}
    for name, means in MIXES.items():
        lengths = mixed_lengths(*means, decoder.context)
        mixes[name] = lengths, max(end for _, end in lengths)
    rows: list[Row] = []
    for name, (lengths, longest) in mixes.items():
        now, ends = [list(x) for x in zip(*lengths, strict=True)]
        found = cache_bytes(token, now, ends, longest, decoder.context, BLOCK)
        rows += [
            {"mix": name, "layout": layout, "cache_bytes": count, "used": found["tokens"] / count}
            for layout, count in found.items()
        ]
    return rows


def draw_layouts(rows: list[Row], file: Path) -> None:
    """Draw which part of the memory for keys and values holds some, by layout (Kwon et al. 2023, figure 2)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    shown = [row for row in rows if row["layout"] != "tokens"]
    mixes, names = (list(dict.fromkeys(row[key] for row in shown)) for key in ("mix", "layout"))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        mine = [row for row in shown if row["layout"] == name]
        places = [k + (i - (len(names) - 1) / 2) * width for k in range(len(mixes))]
        bars = axes.bar(places, [100 * row["used"] for row in mine], width * 0.95, label=name)
        axes.bar_label(bars, [_size(row["cache_bytes"]) for row in mine], fontsize=7)
    axes.set_xticks(range(len(mixes)), ["the bench's own" if mix == "these" else mix for mix in mixes])
    axes.set(ylabel="% of the memory with keys and values", ylim=(0, 110))
    axes.legend(ncols=len(names), loc="upper center", bbox_to_anchor=(0.5, 1.15), frameon=False, fontsize=8)
    figure.savefig(file, dpi=150)


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
