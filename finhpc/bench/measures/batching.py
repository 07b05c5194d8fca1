"""Part of `finhpc bench generate`: requests of mixed lengths and adapters, one at a time and batched; cache layouts."""

from __future__ import annotations

import logging
import random
import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from finhpc.bench.report import Row
from finhpc.bench.settings import GenerateBench
from finhpc.bench.timing import in_turn, median_ratio, spread
from finhpc.generation.batching import BLOCK
from finhpc.generation.decode import passes
from finhpc.generation.decoder import Decoder
from finhpc.generation.paged import cache_bytes
from finhpc.generation.requests import Request
from finhpc.models.lora.multi_lora import Adapters
from finhpc.settings.generate import Sampling

log = logging.getLogger(__name__)


def mixed_requests(settings: GenerateBench, names: Sequence[str], rows: int) -> list[Request]:
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


def layouts(settings: GenerateBench, decoder: Decoder) -> list[Row]:
    """Bytes that keys and values of the mixed requests take at their ends, all at once, in each layout."""
    requests = mixed_requests(settings, ["none"], decoder.config.vocab_size)
    cache: Any = decoder.make_cache(1, BLOCK)
    token = cache.token_bytes * decoder.config.num_hidden_layers
    lengths = [len(request.ids) + request.sampling.max_new_tokens for request in requests]
    found = cache_bytes(token, lengths, settings.prompt + settings.new, decoder.context, BLOCK)
    return [{"layout": name, "cache_bytes": count, "used": found["tokens"] / count} for name, count in found.items()]
