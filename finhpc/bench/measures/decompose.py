"""`finhpc bench decompose`: a whole factorization compared with `torch.linalg.svd`, and two workers with one.

Measured in turn, from the same dense model on disk to its factors on disk:

- a plain loop in this process: each weight read, its full SVD with all `resources.threads`, cut, written;
- `finhpc decompose` with as many workers of one thread each, and with one, Ray and the workers' processes
  already up; only the factorization is timed.

Then the error of every layer is compared with the smallest possible one, from a float64 SVD.
"""

from __future__ import annotations

import logging
import os
import statistics
import tempfile
import time
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from finhpc.bench.report import Row, publish
from finhpc.bench.settings import DecomposeBench
from finhpc.bench.timing import in_turn, median_ratio, spread
from finhpc.cluster.own_ray import own_ray
from finhpc.errors import ConfigError
from finhpc.lowrank.factorize import residual
from finhpc.lowrank.ranks import rank_of_params
from finhpc.lowrank.replace import dense_shape
from finhpc.models.families.registry import family_of, make_config, resolve_shape
from finhpc.models.files.source import open_weights
from finhpc.models.files.weights import Linear, Weights
from finhpc.settings.decompose import DecomposeConfig
from finhpc.settings.training import Resources
from finhpc.training.allocator import return_freed_memory

log = logging.getLogger(__name__)

Shape = tuple[int, int]
SVD, ONE = "torch.linalg.svd", "1 worker"
DENSE = dict.fromkeys(("attention", "mlp", "head", "embedding"))
ROUNDING = 1e-6  # of a weight's norm: errors below that are those of float32


def bench_decompose(settings: DecomposeBench) -> dict[str, Any]:
    """Measure and publish; `ratios`: `speedup_over_svd`, `speedup_2_workers` (with two threads or more).

    Raises `ConfigError` for an unknown shape, or a `rank` that does not fit it.
    """
    import ray

    began = time.perf_counter()
    _check(settings)
    out = Path(os.path.abspath(os.path.expanduser(settings.bench.out)))
    out.mkdir(parents=True, exist_ok=True)
    threads = settings.resources.threads
    many = f"{threads} workers"
    cluster = nullcontext() if ray.is_initialized() else own_ray(max(2, threads))  # one that is up stays so
    with cluster, tempfile.TemporaryDirectory(prefix="decompose-", dir=out) as name:
        folder = Path(name)
        weights = open_weights(settings.path or _write_model(folder / "dense", settings))
        log.info(f"{len(_linears(weights))} weights, {settings.bench.repeats} rounds")
        return_freed_memory()
        plain, ours = Plain(weights, settings, folder), Ours(weights, settings, folder)
        ours.seconds(threads)  # the workers' processes are up and have imported torch
        ways = {SVD: plain.seconds, ONE: lambda: ours.seconds(1)}
        if threads > 1:
            ways[many] = lambda: ours.seconds(threads)
        seconds = in_turn(ways, settings.bench.repeats)
        rows = _rows(weights, plain, ours)
    best = seconds.get(many, seconds[ONE])
    ratios = {"speedup_over_svd": median_ratio(seconds[SVD], best)}
    if threads == 2:
        ratios["speedup_2_workers"] = median_ratio(seconds[ONE], best)
    whole = [
        {"whole model by": name, "wall_s": statistics.median(walls), "spread": spread(walls)}
        for name, walls in seconds.items()
    ]
    return publish("decompose", settings.bench.out, _conditions(settings), rows, ratios, began, whole=whole)


class Plain:
    """The loop anyone would write: one full SVD a weight, with all threads."""

    def __init__(self, weights: Weights, settings: DecomposeBench, folder: Path) -> None:
        self._weights, self._settings, self._out = weights, settings, folder / "svd"
        self._out.mkdir()
        self.of_shape: dict[Shape, list[float]] = {}  # seconds of the SVDs and cuts alone

    def seconds(self) -> float:
        torch.set_num_threads(self._settings.resources.threads)
        began = time.perf_counter()
        for linear in _linears(self._weights):
            weight = self._weights.matrix(linear)
            start = time.perf_counter()
            a, b = cut_svd(weight, _rank(linear, self._settings))
            self.of_shape.setdefault(_shape(linear), []).append(time.perf_counter() - start)
            save_file({"A": a, "B": b}, self._out / f"{linear.name}.safetensors")
        return time.perf_counter() - began


class Ours:
    """`finhpc decompose`, each time into a new folder."""

    def __init__(self, weights: Weights, settings: DecomposeBench, folder: Path) -> None:
        self._weights, self._settings, self._folder = weights, settings, folder
        self._rounds = count()
        self.result: dict[str, Any] = {}
        self.of_shape: dict[Shape, list[float]] = {}  # seconds a layer in its task, reading and writing left out

    def seconds(self, workers: int) -> float:
        from finhpc.commands.decompose.command import decompose

        given = DecomposeConfig(
            model=str(self._weights.path),
            out=str(self._folder / f"low-rank-{next(self._rounds)}"),
            rank=self._settings.rank,
            keep_params=None if self._settings.rank else self._settings.keep_params,
            workers=workers,
            resources=Resources(device="cpu", threads=1, cpus_per_worker=1),
        )
        self.result = decompose(given)
        for layer in self.result["layers"]:
            shape = (layer["out_features"], layer["in_features"])
            self.of_shape.setdefault(shape, []).append(layer["wall_s"])
        return float(self.result["factorise_s"])


def cut_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A and B of the best B A by a full SVD of W (out, in), the singular values split as square roots."""
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    root = values[:rank].sqrt()
    return (root[:, None] * right[:rank]).contiguous(), (left[:, :rank] * root).contiguous()


def falling(shape: Shape, seed: int) -> Tensor:
    """A random matrix (out, in) whose singular values fall by a power law, as a trained layer's do."""
    generator = torch.Generator().manual_seed(seed)
    n = min(shape)
    scale = (1 + torch.arange(n) / 20).pow(-0.7)
    left = torch.randn(shape[0], n, generator=generator) * scale
    matrix: Tensor = left @ torch.randn(n, shape[1], generator=generator) / n**0.5 * 0.02
    return matrix


def over_optimal(weight: Tensor, a: Tensor, b: Tensor) -> float:
    """||W - B A|| over the smallest error that its rank allows, both beyond what float32 rounds away."""
    smallest = float(torch.linalg.svdvals(weight.double())[len(a) :].square().sum().sqrt())
    error = residual(weight.double(), a.double(), b.double())
    allowed = ROUNDING * float(torch.linalg.norm(weight, dtype=torch.float64))
    return max(error - allowed, 0.0) / smallest if smallest > 0 else float(error > allowed)


def _check(settings: DecomposeBench) -> None:
    if settings.path or settings.rank is None:
        return
    width = resolve_shape(_shape_settings(settings)).width
    if settings.rank > width:
        raise ConfigError(f"rank={settings.rank} does not fit a width of {width}; use 1 to {width}.")


def _shape_settings(settings: DecomposeBench) -> Any:
    layers = settings.blocks or settings.model.layers
    return settings.model.model_copy(update={"layers": layers, "vocab_size": 256})


def _write_model(folder: Path, settings: DecomposeBench) -> Path:
    """A model of some blocks of the shape, its linear layers random with falling spectra; a small vocabulary,
    as embedding and head stay as they are."""
    from finhpc.models.folder import save_model
    from finhpc.models.initialize import initial_model

    config = make_config(resolve_shape(_shape_settings(settings)), DENSE)
    model: nn.Module = initial_model(config, 0, "normal")
    with torch.no_grad():
        for seed, (name, module) in enumerate(model.named_modules()):
            shape = dense_shape(module)
            if shape is not None and family_of(config).layer_kind(name) in ("attention", "mlp"):
                weight = falling(shape, seed)
                module.get_parameter("weight").copy_(weight.T if isinstance(module, Conv1D) else weight)
    save_model(folder, config, ((name, p.detach()) for name, p in model.named_parameters()), None)
    return folder


def _rows(weights: Weights, plain: Plain, ours: Ours) -> list[Row]:
    """One row a shape: seconds a weight of both ways, and how far our errors are from the smallest there are."""
    factors = load_file(Path(ours.result["model"]) / "model.safetensors")
    ranks = {layer["name"]: layer["rank"] for layer in ours.result["layers"]}
    over: dict[Shape, list[float]] = {}
    of_shape: dict[Shape, set[int]] = {}
    for linear in _linears(weights):
        a, b = factors[f"{linear.name}.A.weight"], factors[f"{linear.name}.B.weight"]
        over.setdefault(_shape(linear), []).append(over_optimal(weights.matrix(linear), a, b))
        of_shape.setdefault(_shape(linear), set()).add(ranks[linear.name])
    return [
        {
            "weight": f"{shape[0]} x {shape[1]}",
            "weights": len(errors),
            "rank": ", ".join(map(str, sorted(of_shape[shape]))),
            "finhpc_1_thread_s": statistics.median(ours.of_shape[shape]),
            "svd_s": statistics.median(plain.of_shape[shape]),
            "error_over_optimal": max(errors),
        }
        for shape, errors in over.items()
    ]


def _linears(weights: Weights) -> list[Linear]:
    return [linear for linear in weights.linears() if linear.kind in ("attention", "mlp")]


def _shape(linear: Linear) -> Shape:
    return linear.out_features, linear.in_features


def _rank(linear: Linear, settings: DecomposeBench) -> int:
    return settings.rank or rank_of_params(linear.out_features, linear.in_features, settings.keep_params)


def _conditions(settings: DecomposeBench) -> Row:
    random = "random, singular values ~ (1 + i/20)^-0.7"
    return {
        "model": str(settings.path or settings.model.preset),
        "blocks": "all" if settings.path or not settings.blocks else settings.blocks,
        "weights": ("its own" if settings.path else random) + "; those of the blocks, without embedding and head",
        "rank": settings.rank or f"keep_params={settings.keep_params:g}",
        "dtype": "float32 in and out; finhpc's Gram matrix float32 on a CPU where that resolves the rank, else float64",
        "svd": f"full_matrices=False, float32, {settings.resources.threads} threads",
        "finhpc": "Ray tasks of one thread each, processes already up",
        "timed": "from safetensors on disk to factors on disk; assembling the model's folder left out",
        "error_over_optimal": f"beyond {ROUNDING:g} of the weight's norm",
        "repeats": settings.bench.repeats,
    }
