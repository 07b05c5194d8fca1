"""`finhpc bench context`: LoRA steps on long inputs, in every mode of recomputation.

A filing or a call transcript has thousands of tokens and a short answer (FinLoRA's abstract says that such inputs make
finetuning costly). With one example per step, in one process without Ray, this measures what takes the memory of a
step if the input is long, and what each mode of recomputation costs.
"""

from __future__ import annotations

import gc
import logging
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import numpy as np
import torch

from finhpc.bench.measures.finetune import NAMES, lora_engine
from finhpc.bench.report import Row, publish
from finhpc.bench.settings import ContextBench
from finhpc.bench.timing import device_of, in_turn, median_ratio, spread
from finhpc.data.examples.batches import Batches
from finhpc.data.examples.examples import Arrays
from finhpc.errors import ConfigError
from finhpc.models.files.source import locate, open_weights
from finhpc.settings.training import Parallel, Recompute
from finhpc.training.engine import Engine
from finhpc.training.memory import counted_peak, live_tensor_bytes

log = logging.getLogger(__name__)

Way = tuple[int, Recompute]  # tokens, mode


def bench_context(settings: ContextBench) -> dict[str, Any]:
    """Measure and publish; `ratios`, at the longest input: `time_*_over_none` and
    `peak_*_over_none`.

    `peak_memory_bytes` counts live tensors in a step, `state_bytes` those that stay between steps: base, adapters,
    optimizer. Raises `ConfigError` for a GPU, which is not measured, for no model, or for more tokens than its context.
    """
    began = time.perf_counter()
    if device_of(settings.resources).type != "cpu":
        raise ConfigError("bench context measures only CPUs; use resources.device=cpu.")
    if settings.model is None:
        raise ConfigError("bench context needs --model FOLDER, the base.")
    path = locate(settings.model)
    hf_config = open_weights(path).config
    _check(settings, int(hf_config.max_position_embeddings))
    modes: tuple[Recompute, ...] = get_args(Recompute)
    packs = {length: _example(length, settings.answer, hf_config.vocab_size) for length in sorted(settings.lengths)}
    ways: dict[Way, Callable[[], float]] = {}
    memory: dict[Way, Row] = {}
    for mode in modes:
        log.info(f"{mode}: loading the base; then a counted step of each length")
        gc.collect()
        before = live_tensor_bytes()
        engine = lora_engine(path, settings.bits, settings.rank, batch=1, recompute=mode)
        for length, pack in packs.items():
            ways[length, mode] = partial(_step, engine, pack)
            memory[length, mode] = _memory(ways[length, mode], before)
    rows: list[Row] = []
    for length in packs:
        log.info(f"{length} tokens: {settings.bench.repeats} rounds of a step in each of {len(modes)} modes")
        seconds = in_turn({mode: ways[length, mode] for mode in modes}, settings.bench.repeats)
        least = memory[length, "none"]["peak_memory_bytes"]
        rows += [
            {
                "tokens": length,
                "recompute": mode,
                "tokens_per_s": length / statistics.median(seconds[mode]),
                "time_over_none": median_ratio(seconds[mode], seconds["none"]),
                **memory[length, mode],
                "peak_over_none": memory[length, mode]["peak_memory_bytes"] / least,
                "spread": spread(seconds[mode]),
            }
            for mode in modes
        ]
    longest = {row["recompute"]: row for row in rows[-len(modes) :]}
    ratios = {f"{kind}_{mode}_over_none": longest[mode][f"{kind}_over_none"]
              for kind in ("time", "peak") for mode in modes[1:]}  # fmt: skip
    conditions = {
        "model": settings.model,
        "example": f"one per step, random tokens, an answer of {settings.answer}; logits of the answer alone",
        "adapters": f"rank {settings.rank} on every linear layer except the head, float32",
        "base": f"{NAMES[settings.bits]}, bfloat16 activations",
        "optimizer": "AdamW",
        "threads": settings.resources.threads,
        "ray": False,
    }
    return publish("context", settings.bench.out, conditions, rows, ratios, began)


def _check(settings: ContextBench, context: int) -> None:
    shortest, longest = min(settings.lengths), max(settings.lengths)
    if longest > context:
        raise ConfigError(f"lengths={longest} is above the {context} tokens of {settings.model}'s context; shorten it.")
    if shortest <= settings.answer:
        raise ConfigError(f"lengths={shortest} leaves no input before answer={settings.answer} tokens; lengthen it.")


def _memory(step: Callable[[], object], before: int) -> Row:
    """Tensor bytes above `before`: the peak of a step, and what stays between steps (base, adapters, AdamW)."""
    step()  # creates those of the optimizer
    gc.collect()
    state = live_tensor_bytes() - before
    return {"peak_memory_bytes": counted_peak(step)[1] - before, "state_bytes": state}


def _example(length: int, answer: int, vocabulary: int) -> torch.Tensor:
    """A pack of one example, int64 (1, FIELDS, length - 1): its last token predicts nothing."""
    learnt = np.arange(length) >= length - answer
    tokens = np.random.default_rng(length).integers(0, vocabulary, length, dtype=np.int32)
    arrays = Arrays(tokens, np.array([0, length]), learnt, np.zeros(1, np.int32))
    (made,) = Batches(Parallel(micro_batch_size=1), seed=0).step(arrays, 0, 0)
    return torch.from_numpy(made["pack"])


def _step(engine: Engine, pack: torch.Tensor) -> float:
    """Seconds of one step."""
    start = time.perf_counter()
    engine.train_step(iter([pack]), 1e-4)
    return time.perf_counter() - start
