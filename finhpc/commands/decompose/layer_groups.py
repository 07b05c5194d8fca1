"""Groups of layers that are factorized together, and the task that factorizes one group."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from finhpc.commands.decompose.moments import second_moments
from finhpc.errors import CheckpointError, ConfigError
from finhpc.lowrank.blas import product
from finhpc.lowrank.factorize import (
    Spectrum,
    error_of,
    factors,
    residual,
    solved,
    spectra,
    squared_norm,
    whitening_root,
)
from finhpc.lowrank.ranks import rank_of_energy, rank_of_params
from finhpc.lowrank.replace import block_shape, rank_problems, unused_ranks
from finhpc.models.files.source import opened
from finhpc.models.files.tensor_folder import save_tensors
from finhpc.models.files.weights import Linear, Weights
from finhpc.models.pipeline import parts_of
from finhpc.settings.decompose import DecomposeConfig
from finhpc.training.allocator import return_freed_memory
from finhpc.training.memory import peak_resident_bytes

# The most parameters and layers in a group: few enough for memory and even shares on a CPU, enough to fill a GPU.
CPU_GROUP, GPU_GROUP = (4 << 20, 8), (64 << 20, 64)
Report = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """A layer to factorize, each of its `blocks` of rows by itself; `rank` is None if their spectra decide."""

    linear: Linear
    rank: int | None
    blocks: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of a block."""
        return block_shape((self.linear.out_features, self.linear.in_features), self.blocks, self.linear.name)


@dataclass(frozen=True)
class Group:
    """Layers of one shape that one task factorizes; `moments`: file of second moments of their inputs."""

    index: int
    targets: tuple[Target, ...]
    moments: Path | None = None

    def __str__(self) -> str:
        return ", ".join(target.linear.name for target in self.targets)

    def result(self, work: Path) -> Path:
        """Return the file of its factors, which exists once it is done."""
        return work / f"group-{self.index:05d}.safetensors"

    def spectra(self, work: Path) -> Path:
        return work / f"spectra-{self.index:05d}.safetensors"


def targets_of(weights: Weights, config: DecomposeConfig) -> list[Target]:
    """Return every layer that becomes low-rank, with its rank.

    Raises one `ConfigError` for settings with no rank or several, and for all layers that their rank does not fit.
    """
    _check(config)
    chosen = []
    for linear in weights.linears():
        if _wanted(linear, config):
            target = Target(linear, None, weights.family.blocks_of(linear.name, config.qkv))
            chosen.append(replace(target, rank=_rank(target, config)))
    ranked = [(target.linear.name, target.rank, target.shape) for target in chosen if target.rank is not None]
    problems = rank_problems("rank", ranked, " (ranks.KIND sets one kind of layer)")
    if problems:
        raise ConfigError(problems)
    return chosen


def _check(config: DecomposeConfig) -> None:
    problems = unused_ranks(config.ranks, config.head, config.embedding)
    given = [name for name in ("rank", "keep_params", "keep_energy") if getattr(config, name) is not None]
    if not given and not config.ranks:
        problems.append("no rank is set; give one of --rank, --ranks.KIND, --keep_params, --keep_energy.")
    if len(given) > 1:
        problems.append(f"{' and '.join(given)} both set the rank; give one of them.")
    if config.calibration.source and not config.whiten:
        problems.append("calibration.source is given, but whiten is off; add --whiten, or remove the text.")
    if problems:
        raise ConfigError(problems)


def _wanted(linear: Linear, config: DecomposeConfig) -> bool:
    if linear.kind in ("head", "embedding") and getattr(config, linear.kind) == "dense":
        return False
    return not {linear.kind, linear.projection}.isdisjoint(config.ranks) or any(
        setting is not None for setting in (config.rank, config.keep_params, config.keep_energy)
    )


def _rank(target: Target, config: DecomposeConfig) -> int | None:
    for key in (target.linear.projection, target.linear.kind):
        if key in config.ranks:
            return config.ranks[key]
    if config.keep_params is not None:
        return rank_of_params(*target.shape, config.keep_params)
    return config.rank


def groups_of(targets: list[Target], weights: Weights, whiten: bool, cuda: bool) -> list[Group]:
    """Group layers of one shape, the largest groups first; whitened ones within one part of the model."""
    part_of = _parts(weights) if whiten else {}

    def key(target: Target) -> tuple[int, int, int, int]:
        return part_of.get(target.linear.name, 0), *target.shape, target.blocks

    most_params, most_layers = GPU_GROUP if cuda else CPU_GROUP
    results: list[tuple[Target, ...]] = []
    for _, same in groupby(sorted(targets, key=key), key):
        layers = list(same)
        width = max(1, min(most_layers, most_params // layers[0].linear.size))
        results += [tuple(layers[i : i + width]) for i in range(0, len(layers), width)]
    if not whiten:  # otherwise they stay in the order in which the text passes through the model
        results.sort(key=lambda layers: -sum(target.linear.size * min(target.shape) for target in layers))
    return [Group(index, layers) for index, layers in enumerate(results)]


def _parts(weights: Weights) -> dict[str, int]:
    """Return the index of the part of each linear layer."""
    results: dict[str, int] = {}
    for index, part in enumerate(parts_of(weights.config)):
        for name in part.names:
            for sub, _ in weights.skeleton.get_submodule(name).named_modules(prefix=name):
                results.setdefault(sub, index)
        if part.kind == "head":
            results["lm_head"] = index
    return results


def with_moments(
    pending: Iterable[Group], weights: Weights, tokens: Tensor, work: Path, device: torch.device
) -> Iterator[Group]:
    """Yield each group as soon as the moments of its layers' inputs are on disk. An embedding has no moments."""
    waiting = {target.linear.name: group for group in pending for target in group.targets}
    plain = {group.index: group for group in waiting.values() if group.targets[0].linear.kind == "embedding"}
    yield from plain.values()
    wanted = {name for name, group in waiting.items() if group.index not in plain}
    for moments in second_moments(weights, tokens, wanted, device):
        ready = {waiting[name].index: waiting[name] for name in moments if name in wanted}
        for group in ready.values():
            path = work / f"moments-{group.index:05d}.safetensors"
            names = [target.linear.name for target in group.targets]
            owners = {name: next(other for other in names if moments[other] is moments[name]) for name in names}
            save_tensors({owner: moments[owner] for owner in owners.values()}, path, {"owners": json.dumps(owners)})
            yield replace(group, moments=path)


@dataclass(frozen=True)
class Factorization:
    """The arguments that all tasks of one decomposition share; `stamp` is the hash of settings and files."""

    source: Path
    stamp: str
    work: Path
    keep_energy: float | None
    threads: int
    cuda: bool


def whitened_groups(task: Factorization, given: tuple[list[Group], Tensor]) -> Iterator[Group]:
    """Yield the pending groups that are `given`, each with the moments of its inputs over the tokens."""
    torch.set_num_threads(task.threads)
    pending, tokens = given
    weights, device = opened(task.source, task.stamp), torch.device("cuda" if task.cuda else "cpu")
    yield from with_moments(pending, weights, tokens, task.work, device)


def factorize_group(task: Factorization, group: Group) -> tuple[int, int]:
    """Write the factors of one group; return this process's id and its peak memory in bytes."""
    return_freed_memory()
    torch.set_num_threads(task.threads)
    _factorize(task, group)
    return os.getpid(), peak_memory_bytes(task.cuda)


def peak_memory_bytes(cuda: bool) -> int:
    """Return this process's peak memory: the allocator's on a GPU, otherwise resident bytes."""
    return torch.cuda.max_memory_allocated() if cuda else peak_resident_bytes()


def _factorize(task: Factorization, group: Group) -> None:
    weights = opened(task.source, task.stamp)
    device = torch.device("cuda" if task.cuda else "cpu")
    matrices = [weights.matrix(target.linear).to(device) for target in group.targets]
    blocks = group.targets[0].blocks
    began = time.perf_counter()
    roots = _roots(group, device)
    pieces = [piece for matrix in matrices for piece in matrix.chunk(blocks)]
    results = [] if roots else solved(pieces, lambda i, spectrum: _rank_in(group.targets[i // blocks], spectrum, task))
    tensors: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    reports: list[Report] = []
    for i, target in enumerate(group.targets):
        name, own = target.linear.name, slice(i * blocks, (i + 1) * blocks)
        root, damping = roots.get(name, (None, None))
        if root is None:
            known = results[own]
        else:  # steeper than the weight's own spectrum, always in float64
            found = spectra([product(piece.double(), root) for piece in pieces[own]])
            known = [(spectrum, _rank_in(target, spectrum, task)) for spectrum in found]
        factorized = _factorized(pieces[own], known, root)
        reports.append(_report(target, factorized, root, damping))
        a, b = torch.cat([one.a for one in factorized]), torch.cat([one.b for one in factorized])
        tensors[f"{name}.A.weight"] = (a.T if target.linear.kind == "embedding" else a).cpu()
        tensors[f"{name}.B.weight"] = b.cpu()
        values[name] = torch.stack([one.spectrum.values for one in factorized]).squeeze(0).cpu()
    seconds = (time.perf_counter() - began) / len(reports)
    for report in reports:
        report["wall_s"] = seconds
    save_tensors(values, group.spectra(task.work), {})
    save_tensors(tensors, group.result(task.work), {"layers": json.dumps(reports)})
    if group.moments is not None:
        group.moments.unlink(missing_ok=True)


@dataclass(frozen=True)
class Factorized:
    """A matrix (out, in), or a block of its rows, and its factors: A (rank, in), B (out, rank)."""

    weight: Tensor
    spectrum: Spectrum
    a: Tensor
    b: Tensor


def _factorized(pieces: list[Tensor], known: list[tuple[Spectrum, int]], root: Tensor | None) -> list[Factorized]:
    """Factorize the blocks of a layer at one rank: the highest that one of them needs."""
    rank = max(rank for _, rank in known)
    results = []
    for piece, (spectrum, own) in zip(pieces, known, strict=True):
        if own < rank and not spectrum.resolves(rank):
            spectrum = spectra([piece])[0]
        results.append(Factorized(piece, spectrum, *factors(piece, spectrum, rank, root)))
    return results


def _roots(group: Group, device: torch.device) -> dict[str, tuple[Tensor, float]]:
    """Return (S, damping) of each layer of a whitened group; empty for a plain one."""
    if group.moments is None:
        return {}
    with safe_open(group.moments, framework="pt") as file:
        owners: dict[str, str] = json.loads(file.metadata()["owners"])
    roots = {}
    for name, moment in load_file(group.moments).items():
        try:
            roots[name] = whitening_root(moment.to(device))
        except ValueError as error:
            raise CheckpointError(f"{name}: {error}: its inputs are all zero or not finite; give other text.") from None
    return {name: roots[owner] for name, owner in owners.items()}


def _report(target: Target, blocks: list[Factorized], root: Tensor | None, damping: float | None) -> Report:
    """Return a layer's entry in result.json.

    `error` is relative to the weight's norm. The optimum is of what was minimized: the error of the weight, or of its
    outputs on the calibration text.
    """
    linear, rank = target.linear, len(blocks[0].a)
    norm = sum(squared_norm(one.weight) for one in blocks) ** 0.5 or 1.0
    if root is None:
        minimized = error = math.hypot(*(error_of(one.weight, one.a, one.b) for one in blocks))
    else:
        error = math.hypot(*(residual(one.weight, one.a, one.b) for one in blocks))
        minimized = math.hypot(*(residual(one.weight, one.a, one.b, root) for one in blocks))
    scale = math.hypot(*(float(one.spectrum.values.square().sum().sqrt()) for one in blocks)) or 1.0
    optimum = math.hypot(*(one.spectrum.optimum(rank) for one in blocks))
    report: Report = {
        "name": linear.name,
        "kind": linear.kind,
        "out_features": linear.out_features,
        "in_features": linear.in_features,
        "blocks": target.blocks,
        "rank": rank,
        "error": error / norm,
        "error_optimal": optimum / scale,
        # With the full spectrum the optimum is only rounding error, and so would be the quotient.
        "error_over_optimal": minimized / optimum if optimum > 1e-6 * scale else None,
    }
    if root is not None:
        report |= {"output_error": minimized / scale, "damping": damping}
    return report


def _rank_in(target: Target, spectrum: Spectrum, task: Factorization) -> int:
    if target.rank is not None:
        return target.rank
    assert task.keep_energy is not None, "a target without a rank is decided by its energy"
    return rank_of_energy(spectrum.values, task.keep_energy)
