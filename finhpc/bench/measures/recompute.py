"""`finhpc bench recompute`: forward and backward passes that recompute activations, compared with those that keep all.

FinGPT-HPC, section IV.B, counts 33 % more computation if whole blocks are recomputed, and 6 % if only attention's large
intermediates are. Here whole passes over a model are measured, all modes in turn over the same weights, in one process
without Ray and without the optimizer, which is the same in all modes.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

from finhpc.bench.report import Row, publish
from finhpc.bench.settings import RecomputeBench
from finhpc.bench.timing import device_of, in_turn, median_ratio, spread, timed
from finhpc.models.families.registry import config_of_method, resolve_shape, skeleton
from finhpc.models.initialize import initial_model, random_fill
from finhpc.models.pipeline import PipelineLayer, parts_of
from finhpc.settings.training import Recompute
from finhpc.training.activation_bytes import block_saved_bytes
from finhpc.training.memory import counted_peak

log = logging.getLogger(__name__)


def bench_recompute(settings: RecomputeBench) -> dict[str, Any]:
    """Measure and publish; `ratios`: `time_attention_over_none` and `time_full_over_none`.

    A row has the bytes that the first block keeps for its backward pass, the share removed, and the peak of the model.
    Raises `ConfigError` if `resources.device=cuda` finds no GPU.
    """
    began = time.perf_counter()
    device = device_of(settings.resources)
    shape = resolve_shape(settings.model, None)
    hf_config = config_of_method(shape, settings.method)
    weights: Any = initial_model(hf_config, 0, "normal").to(device)
    tokens = torch.randint(0, shape.vocab_size, (settings.batch, settings.seq_len)).to(device)
    modes: tuple[Recompute, ...] = get_args(Recompute)
    ways = {mode: _passes(settings, hf_config, mode, weights, tokens) for mode in modes}
    peaks = {mode: _peak(way, device) for mode, way in ways.items()}  # warms up too
    log.info(f"{settings.bench.repeats} rounds of a forward and a backward pass in each of {len(ways)} modes")
    seconds = in_turn({mode: partial(timed, way, device) for mode, way in ways.items()}, settings.bench.repeats)
    saved = {mode: _block_bytes(settings, hf_config, mode, weights) for mode in modes}
    rows: list[Row] = [
        {
            "recompute": mode,
            "passes_s": statistics.median(seconds[mode]),
            "over_none": median_ratio(seconds[mode], seconds["none"]),
            "saved_bytes_per_block": saved[mode],
            "removed": 1 - saved[mode] / saved["none"],
            "peak_memory_bytes": peaks[mode],
            "spread": spread(seconds[mode]),
        }
        for mode in modes
    ]
    conditions = {
        "model": settings.model.preset,
        "method": settings.method.kind,
        "batch": f"{settings.batch} x {settings.seq_len} tokens, no padding",
        "precision": f"{settings.precision}, float32 weights and gradients",
        "threads": settings.resources.threads,
        "device": device.type,
        "ray": False,
        "step": "forward and backward passes of the whole model, no optimizer",
        "paper": "full 1.33, attention 1.06 times the computation",
    }
    ratios = {f"time_{row['recompute']}_over_none": float(row["over_none"]) for row in rows[1:]}
    return publish("recompute", settings.bench.out, conditions, rows, ratios, began)


def _sharing(hf_config: Any, recompute: Recompute, weights: Any) -> Any:
    """The model in a mode of recomputation, with the very parameters of `weights`."""
    model = skeleton(hf_config, recompute)
    model.load_state_dict(weights.state_dict(keep_vars=True), assign=True)
    return model


def _passes(
    settings: RecomputeBench, hf_config: Any, recompute: Recompute, weights: Any, tokens: Tensor
) -> Callable[[], None]:
    """One forward and one backward pass; the gradients are dropped."""
    model, fill = _sharing(hf_config, recompute, weights), random_fill(hf_config, 0, "normal")
    row, precision = parts_of(hf_config, recompute), settings.precision
    layers = [PipelineLayer(part, model, tokens.device, fill, precision) for part in row]
    parameters = list(model.parameters())

    def passes() -> None:
        data: Any = tokens
        for layer in layers:
            data = layer(data)
        data.backward()
        for parameter in parameters:
            parameter.grad = None

    return passes


def _block_bytes(settings: RecomputeBench, hf_config: Any, recompute: Recompute, weights: Any) -> int:
    """Bytes that the first block keeps for its backward pass."""
    model = _sharing(hf_config, recompute, weights)
    with torch.autocast(next(model.parameters()).device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
        return block_saved_bytes(parts_of(hf_config, recompute), model, settings.batch, settings.seq_len)


def _peak(work: Callable[[], None], device: torch.device) -> int:
    """Peak bytes of `work`: of the allocator on CUDA, of live tensors on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return int(torch.cuda.max_memory_allocated(device))
    return counted_peak(work)[1]
