"""`finhpc bench train`: whole training steps, low-rank compared with dense, and finhpc with a plain torch loop.

Two questions, answered by measuring in turn:

- How much faster is a low-rank step than the fastest dense one (ours or transformers' own, eager or compiled), what
  share of the speedup that operation counts allow is that, and where does the time go? One process, no Ray; the
  engine is that of every run, with one stage.
- What do engine, Ray, streaming and tracking cost? A whole `finhpc pretrain` against a plain loop over
  the same model and batches, each in its own process (with `--ray false`: the engine alone, in this one).
"""

from __future__ import annotations

import logging
import os
import socket
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from finhpc.bench.measures.overhead import overhead
from finhpc.bench.plain.pretrain import Step, parts_step, transformers_step
from finhpc.bench.profile import profiled
from finhpc.bench.report import Row, publish
from finhpc.bench.settings import TrainBench
from finhpc.bench.timing import device_of, median_ratio, spread, timed
from finhpc.models.families.registry import config_of_method, resolve_shape, skeleton
from finhpc.settings.base import build
from finhpc.settings.pretrain import PretrainConfig
from finhpc.training.compiler import missing_compiler
from finhpc.training.engine import Engine

log = logging.getLogger(__name__)

LR = 1e-4


def bench_train(settings: TrainBench) -> dict[str, Any]:
    """Measure and publish; `ratios`: `speedup_over_limit_*` and `overhead_*` for each precision.

    `profile`: shares of a step's time by kind of operation, for the dense ways and the first rank's.

    Raises `ConfigError` if `resources.device=cuda` finds no GPU.
    """
    began = time.perf_counter()
    device = device_of(settings.resources)
    rows: list[Row] = []
    profiles: list[Row] = []
    ratios: dict[str, float] = {}
    for precision in settings.precisions:
        more, ratio, shares = _low_rank_and_dense(settings, precision, device)
        rows += more
        profiles += shares
        ratios |= ratio
    for precision in settings.precisions if settings.ray else ():
        more, ratio = overhead(run_config(settings, precision, settings.ranks[0]), settings)
        rows += more
        ratios |= ratio
    conditions = {
        "model": settings.model.preset,
        "batch": f"{settings.batch} x {settings.seq_len} tokens, no padding",
        "weights": "float32 (master), gradients and AdamW moments float32; bf16: autocast",
        "threads": settings.resources.threads,
        "device": device.type,
        "ray": "for finhpc pretrain only" if settings.ray else False,
        "step": "forward, backward, clipping, fused AdamW",
    }
    return publish("train", settings.bench.out, conditions, rows, ratios, began, profile=profiles)


def run_config(settings: TrainBench, precision: str, rank: int, compiled: bool = False) -> PretrainConfig:
    """The run that is measured; rank 0 is the dense model."""
    return build(
        PretrainConfig,
        {
            "model": settings.model.model_dump() | {"context": max(settings.seq_len, settings.model.context or 1024)},
            "method": {"kind": "low_rank", "rank": rank} if rank else {"kind": "dense"},
            "data": {"seq_len": settings.seq_len},
            "optimizer": {"lr": LR, "warmup_steps": 0, "min_lr_ratio": 1.0},
            "parallel": {"micro_batch_size": settings.batch},
            "train": {"precision": precision, "compile": "on" if compiled else "off"},
            "resources": settings.resources.model_dump(),
        },
    )


def operations(hf_config: Any, seq_len: int) -> float:
    """Multiplications per token of a forward pass: matrices and the full products of attention."""
    model: Any = skeleton(hf_config)
    looked_up = {id(p) for p in model.get_input_embeddings().parameters()}
    looked_up |= {id(p) for name, p in model.named_parameters() if "wpe" in name}
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2 and id(p) not in looked_up)
    if hf_config.tie_word_embeddings:
        matrices += hf_config.vocab_size * hf_config.hidden_size
    return float(matrices + 2 * seq_len * hf_config.hidden_size * hf_config.num_hidden_layers)


def _low_rank_and_dense(
    settings: TrainBench, precision: str, device: torch.device
) -> tuple[list[Row], dict[str, float], list[Row]]:
    log.info(f"{precision}: building the models; then {settings.bench.repeats} rounds of a step each")
    ways, configs = _ways(settings, precision, device)
    draw = torch.Generator().manual_seed(0)
    vocab = int(configs["dense, finhpc"].vocab_size)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(-2, settings.bench.repeats):  # two rounds to warm up
        tokens = torch.randint(0, vocab, (settings.batch, settings.seq_len), generator=draw)
        for name in list(ways) if round_ % 2 == 0 else list(reversed(ways)):
            took = timed(partial(ways[name], tokens, LR), device)
            if round_ >= 0:
                seconds[name].append(took)
        if round_ >= 0:
            log.info(f"{precision}: round {round_ + 1} of {settings.bench.repeats}")
    profiles = [
        {"precision": precision, "way": name} | profiled(partial(way, tokens, LR), device)
        for name, way in ways.items()
        if not name.startswith(tuple(f"rank {rank}," for rank in settings.ranks[1:]))
    ]
    return *_speedups(settings, precision, configs, seconds), profiles


def _speedups(
    settings: TrainBench,
    precision: str,
    configs: dict[str, Any],
    seconds: dict[str, list[float]],
) -> tuple[list[Row], dict[str, float]]:
    dense = min(
        (name for name in seconds if name.startswith("dense")), key=lambda name: statistics.median(seconds[name])
    )
    dense_operations = operations(configs["dense, finhpc"], settings.seq_len)
    rows: list[Row] = []
    for name, values in seconds.items():
        counted = operations(configs[name], settings.seq_len)
        speedup, limit = median_ratio(seconds[dense], values), dense_operations / counted
        step_s = statistics.median(values)
        rows.append(
            {
                "way": name,
                "precision": precision,
                "params": sum(p.numel() for p in skeleton(configs[name]).parameters()),
                "step_s": step_s,
                "tokens_per_s": settings.batch * settings.seq_len / step_s,
                "matrix_gflops": 6 * counted * settings.batch * settings.seq_len / step_s / 1e9,
                "speedup": speedup,
                "limit": limit,
                "speedup_over_limit": speedup / limit,
                "spread": spread(values),
            }
        )
    first = f"rank {settings.ranks[0]}, finhpc"
    ways = [name for name in (first, f"{first}, compiled") if name in seconds]
    first = min(ways, key=lambda name: statistics.median(seconds[name]))
    ratios = {f"speedup_over_limit_{precision}": next(r["speedup_over_limit"] for r in rows if r["way"] == first)}
    plain = f"rank {settings.ranks[0]}, plain loop over the same parts"
    if plain in seconds:
        ratios[f"overhead_{precision}"] = median_ratio(seconds[plain], seconds[first])
    return rows, ratios


def _ways(settings: TrainBench, precision: str, device: torch.device) -> tuple[dict[str, Step], dict[str, Any]]:
    """Name -> a function that takes one step, and name -> the model's transformers config."""
    ways: dict[str, Step] = {}
    configs: dict[str, Any] = {}

    def add(name: str, rank: int, make: Callable[[PretrainConfig, Any], Step], compiled: bool = False) -> None:
        config = run_config(settings, precision, rank, compiled)
        name += ", compiled" if compiled else ""
        configs[name] = config_of_method(resolve_shape(config.model, None), config.method)
        ways[name] = make(config, configs[name])

    first = settings.ranks[0]
    one_process_group(device)
    both = [False, True] if settings.compiled and missing_compiler(device.type) is None else [False]
    if resolve_shape(settings.model, None).family == "gpt2":
        for rank, name in ((0, "dense, transformers"), (first, f"rank {first}, transformers with pairs")):
            for compiled in both:
                add(name, rank, partial(_transformers_step, rank=rank, device=device), compiled)
    for rank in (0, *settings.ranks):
        for compiled in both if rank in (0, first) else [False]:
            name = f"rank {rank}, finhpc" if rank else "dense, finhpc"
            add(name, rank, lambda config, hf: _engine_step(Engine(config, hf, device)), compiled)
    if not settings.ray:
        add(f"rank {first}, plain loop over the same parts", first, lambda config, hf: parts_step(config, hf, device))
    return ways, configs


def _transformers_step(config: PretrainConfig, hf_config: Any, rank: int, device: torch.device) -> Step:
    return transformers_step(config, hf_config, rank, device)


def _engine_step(engine: Engine) -> Step:
    return lambda tokens, lr: engine.train_step(iter([tokens]), lr)


def one_process_group(device: torch.device) -> None:
    """Create the process group that the engine needs, of this process alone."""
    if dist.is_initialized():
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= alone | {"DS_ACCELERATOR": device.type}
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=0, world_size=1)
