"""`finhpc bench decompose`: the factorisation beside `torch.linalg.svd`, weight by weight; two workers beside one.

- The weights of a model's blocks (random, with falling spectra) are factorised one after the other in
  this process, by both ways in turn, with the same threads. A few weights of each shape are measured
  and stand for the others of that shape.
- Whole `finhpc decompose` runs of a model of some of the blocks with 1 and 2 workers of one thread
  each, Ray and the workers' processes already up; the seconds are those of the factorising.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections import Counter
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finhpc.bench.pairs import in_turn, median_ratio, spread
from finhpc.bench.report import Row, publish, say
from finhpc.bench.settings import DecomposeBench
from finhpc.config import DecomposeConfig, Resources
from finhpc.lowrank.factorize import factors, residual, solved
from finhpc.lowrank.ranks import rank_of_params
from finhpc.lowrank.replace import dense_shape, layer_kind
from finhpc.models.families import make_config, skeleton
from finhpc.models.presets import resolve_shape

Shape = tuple[int, int]
FINHPC, SVD = "finhpc", "torch.linalg.svd"


def bench_decompose(settings: DecomposeBench) -> dict[str, Any]:
    """Measure and publish; `ratios`: `speedup_over_svd` (the blocks of the whole model), `speedup_2_workers`.

    Raises `ConfigError` where the shape is none.
    """
    began = time.perf_counter()
    counts = _counts(settings)
    torch.set_num_threads(settings.resources.threads)
    rows: list[Row] = []
    walls: dict[str, list[float]] = {FINHPC: [0.0] * settings.bench.repeats, SVD: [0.0] * settings.bench.repeats}
    for shape, weights_of_it in counts.items():
        row, seconds = _measure(shape, weights_of_it, settings)
        rows.append(row)
        for name, values in seconds.items():
            walls[name] = [whole + weights_of_it * one for whole, one in zip(walls[name], values, strict=True)]
    rows.append(
        {
            "weight": f"all {sum(counts.values())} of the blocks",
            "weights": sum(counts.values()),
            "rank": None,
            "finhpc_s": statistics.median(walls[FINHPC]),
            "svd_s": statistics.median(walls[SVD]),
            "speedup": median_ratio(walls[SVD], walls[FINHPC]),
            "spread": spread(walls[FINHPC]),
            "error_over_optimal": max(row["error_over_optimal"] for row in rows),
        }
    )
    ratios = {"speedup_over_svd": median_ratio(walls[SVD], walls[FINHPC])}
    more: dict[str, Any] = {}
    if settings.blocks:
        more["workers"], ratios["speedup_2_workers"] = _two_workers(settings)
    return publish("decompose", settings.bench.out, _conditions(settings), rows, ratios, began, **more)


def falling(shape: Shape, seed: int) -> Tensor:
    """A random matrix (out, in) whose singular values fall by a power law, as a trained layer's do."""
    generator = torch.Generator().manual_seed(seed)
    n = min(shape)
    scale = (1 + torch.arange(n) / 20).pow(-0.7)
    left = torch.randn(shape[0], n, generator=generator) * scale
    matrix: Tensor = left @ torch.randn(n, shape[1], generator=generator) / n**0.5 * 0.02
    return matrix


def _counts(settings: DecomposeBench) -> Counter[Shape]:
    """Shape (out, in) -> how many weights of the blocks have it."""
    dense = dict.fromkeys(("attention", "mlp", "head", "embedding"))
    model = skeleton(make_config(resolve_shape(settings.model), dense))
    found: Counter[Shape] = Counter()
    for name, module in model.named_modules():
        shape = dense_shape(module)
        if shape is not None and layer_kind(name) in ("attention", "mlp"):
            found[shape] += 1
    return found


def _measure(shape: Shape, weights_of_it: int, settings: DecomposeBench) -> tuple[Row, dict[str, list[float]]]:
    """A shape's row, and seconds a weight of both ways, one of each a repeat."""
    rank = rank_of_params(*shape, settings.keep_params)
    say(f"{shape[0]} x {shape[1]}, rank {rank}: {weights_of_it} of them, {settings.bench.repeats} pairs")
    weights = [falling(shape, seed) for seed in range(settings.bench.repeats)]
    _svd(weights[0][:64, :64], 8)  # what the first call sets up
    _ours(weights[0][:64, :64], 8)
    turn = {FINHPC: 0, SVD: 0}
    over: list[float] = []

    def timed(name: str) -> float:
        weight = weights[turn[name]]
        turn[name] += 1
        began = time.perf_counter()
        a, b, _ = _ours(weight, rank) if name == FINHPC else _svd(weight, rank)
        seconds = time.perf_counter() - began
        if name == FINHPC:
            optimum = torch.linalg.svdvals(weight.double())[rank:].square().sum().sqrt()
            over.append(residual(weight, a, b) / float(optimum))
        return seconds

    seconds = in_turn({FINHPC: lambda: timed(FINHPC), SVD: lambda: timed(SVD)}, settings.bench.repeats)
    row = {
        "weight": f"{shape[0]} x {shape[1]}",
        "weights": weights_of_it,
        "rank": rank,
        "finhpc_s": statistics.median(seconds[FINHPC]),
        "svd_s": statistics.median(seconds[SVD]),
        "speedup": median_ratio(seconds[SVD], seconds[FINHPC]),
        "spread": spread(seconds[FINHPC]),
        "error_over_optimal": max(over),
    }
    return row, seconds


def _ours(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    spectrum, _ = solved(weight[None], lambda i, spectrum: rank)[0]
    return *factors(weight, spectrum, rank), spectrum.values


def _svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    root = values[:rank].sqrt()
    return root[:, None] * right[:rank], left[:, :rank] * root, values


def _two_workers(settings: DecomposeBench) -> tuple[list[Row], float]:
    """Decompose a model of some of the blocks with 1 and 2 workers, in turn."""
    import ray

    from finhpc.orchestration.decompose import decompose

    out = Path(os.path.abspath(os.path.expanduser(settings.bench.out)))
    out.mkdir(parents=True, exist_ok=True)
    shape = settings.model.model_copy(update={"layers": settings.blocks, "vocab_size": 256})
    config = make_config(resolve_shape(shape), dict.fromkeys(("attention", "mlp", "head", "embedding")))
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        with tempfile.TemporaryDirectory(prefix="decompose-", dir=out) as folder:
            _write_model(Path(folder) / "dense", config)

            rounds = count()

            def factorise(workers: int) -> float:
                given = DecomposeConfig(
                    model=f"{folder}/dense",
                    out=f"{folder}/low-rank-{next(rounds)}",
                    keep_params=settings.keep_params,
                    workers=workers,
                    resources=Resources(device="cpu", threads=1, cpus_per_worker=1),
                )
                return float(decompose(given)["factorise_s"])

            factorise(2)  # both workers' processes are up and have imported torch
            seconds = in_turn({"1": lambda: factorise(1), "2": lambda: factorise(2)}, settings.bench.repeats)
    finally:
        ray.shutdown()
    rows = [
        {"workers": int(name), "factorise_s": statistics.median(found), "spread": spread(found)}
        for name, found in seconds.items()
    ]
    return rows, median_ratio(seconds["1"], seconds["2"])


def _write_model(folder: Path, config: Any) -> None:
    from finhpc.models.loading import initial_model, save_model

    model: nn.Module = initial_model(config, 0, "normal")
    save_model(folder, config, [lambda: {name: p.detach() for name, p in model.named_parameters()}], None)


def _conditions(settings: DecomposeBench) -> Row:
    return {
        "model": settings.model.preset,
        "weights": "random, singular values ~ (1 + i/20)^-0.7; those of all blocks, without embedding and head",
        "measured_of_each_shape": f"{settings.bench.repeats}, which stand for all of it",
        "keep_params": settings.keep_params,
        "dtype": "float32 in and out; finhpc's Gram matrix float32 where that resolves the rank, else float64",
        "svd": "full_matrices=False, float32, the factors cut and scaled from it",
        "threads": settings.resources.threads,
        "two_workers": f"{settings.blocks} blocks, one thread each, processes already up",
        "repeats": settings.bench.repeats,
    }
