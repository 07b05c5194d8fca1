"""A dense model -> a low-rank one of its best factors: `finhpc decompose` (FinGPT-HPC, sections III.C and IV.B).

Parallel Ray tasks factorize groups of layers, each into a file of `OUT.partial`, so that an interrupted run continues.
Then the files are copied into one model folder, which gets its name last. Weights are read one at a time and never
in memory together.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from finhpc.cluster.connect import cluster_resources, places, ray_cluster, use_cuda
from finhpc.cluster.ready import check_ray
from finhpc.cluster.tasks import is_finished, run_tasks, stream_task, workplace
from finhpc.commands.decompose.layer_groups import (
    Factorization,
    Group,
    Report,
    Target,
    factorize_group,
    groups_of,
    peak_memory_bytes,
    targets_of,
    whitened_groups,
)
from finhpc.commands.decompose.spectra import draw, factor_params, save_spectra, summary
from finhpc.data.text.calibration import calibration_blocks
from finhpc.errors import CheckpointError, ConfigError
from finhpc.evaluation import plausible
from finhpc.files import file_stamps, json_sha256, publish, write_json
from finhpc.models.families.registry import (
    as_low_rank,
    context_name,
    context_of,
    model_sizes,
    parameter_count,
    skeleton,
)
from finhpc.models.files.manifest import check_manifest, write_manifest
from finhpc.models.files.source import copy_tokenizer, find_tokenizer, locate, open_weights
from finhpc.models.files.tensor_folder import TensorFolderWriter
from finhpc.models.files.tokens import check_rows
from finhpc.models.files.weights import Weights
from finhpc.screen import Progress
from finhpc.settings.decompose import DecomposeConfig
from finhpc.settings.pretrain import LINEAR_KINDS, Qkv
from finhpc.training.allocator import return_freed_memory

log = logging.getLogger(__name__)

FORMAT = 1
RESULT = "result.json"


def decompose(config: DecomposeConfig, dry_run: bool = False) -> dict[str, Any]:
    """Write a low-rank model folder of `config.model` to `config.out` and return the content of its result.json.

    Continues an interrupted run of the same settings, and returns the result of a finished one. `dry_run` checks and
    counts only. Raises `ConfigError` for settings, models and texts that cannot work, `CheckpointError` for weights
    that cannot be read or are not finite, `UnfinishedError` if the machine fails, and `RunBusyError` if another
    process writes the same folder.
    """
    began = time.monotonic()
    if not config.out:
        raise ConfigError("out is not set; give --out with a folder for the low-rank model.")
    source, out = locate(config.model), Path(config.out).expanduser().absolute()
    settings, work = settings_sha256(config, source), out.with_name(out.name + ".partial")
    if is_finished(out, RESULT, settings, "a model", work):
        return json.loads((out / RESULT).read_bytes())  # type: ignore[no-any-return]
    check_manifest(source, quickly=dry_run)
    weights = open_weights(source)
    if (tokenizer := find_tokenizer(source)) is not None:
        check_rows(tokenizer, weights.config.vocab_size, f"model={source}")
    targets = targets_of(weights, config)
    if dry_run:
        return _dry_run(config, weights, targets)
    check_ray()  # here, because an error inside the workplace would remove earlier work
    with workplace(work, out, settings):
        with ray_cluster():
            cuda = use_cuda(config.resources, cluster_resources())
            groups = groups_of(targets, weights, config.whiten, cuda)
            task = Factorization(source, settings, work, config.keep_energy, config.resources.threads, cuda)
            factorize_began = time.monotonic()
            peaks = _factorize(groups, weights, task, config)
        factorize_s = time.monotonic() - factorize_began
        reports = _reports(groups, work)
        model = _assemble(weights, groups, reports, work)
        result = _result(config, weights, reports) | {
            "peak_memory_bytes": [peak_memory_bytes(False), *peaks.values()],
            "factorise_s": factorize_s,
            "wall_s": time.monotonic() - began,
            "settings_sha256": settings,
        }
        save_spectra(groups, work, model / "spectra.npz")
        draw(model / "spectra.npz", reports, model / "spectra.png")
        plausible.check(f"decompose {config.model}", result)
        write_json(model / RESULT, result)
        publish(model, out)
    shutil.rmtree(work)
    summary(result)
    return result


def settings_sha256(config: DecomposeConfig, source: Path) -> str:
    """Return one hash of all that the factors depend on: settings, and the size and time of every input file."""
    named = [source, *(Path(text) for text in config.calibration.source)]
    files = [file for path in named for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    settings = config.model_dump(exclude={"out", "workers", "resources", "model"})
    return json_sha256([FORMAT, settings, config.resources.device, file_stamps(files)])


def _factorize(groups: list[Group], weights: Weights, task: Factorization, config: DecomposeConfig) -> dict[int, int]:
    """Factorize every group that has no file yet, in parallel; return the peak memory in bytes of each process."""
    pending = [group for group in groups if not group.result(task.work).is_file()]
    layers, left = (sum(len(group.targets) for group in some) for some in (groups, pending))
    if left < layers:
        log.info(f"continuing: {layers - left} of {layers} layers are done")
    peaks: dict[int, int] = {}
    if not pending:
        return peaks
    cpus, gpus = config.resources.cpus_per_worker, config.resources.gpus_per_worker if task.cuda else 0
    # One more than run at a time, so that a worker that ends one can start the next at once.
    width = config.workers or places(config.resources, task.cuda) + 1
    ready: Iterable[Group] = pending
    return_freed_memory()
    if config.whiten:
        tokens = _calibration(weights, task.work, config)
        ready = whitened_groups(task, (pending, tokens))
        if task.cuda and not torch.cuda.is_available():  # the cluster has GPUs and this machine has none
            # With a single GPU the moments of all layers are on disk before the first one is factorized.
            ahead = width if width > 2 else None
            ready = stream_task(partial(whitened_groups, task), (pending, tokens), "calibration", ahead, cpus, gpus)
    with Progress("factorizing", left, "matrices") as progress:
        for group, (process, peak) in run_tasks(partial(factorize_group, task), ready, str, width, cpus, gpus):
            peaks[process] = max(peak, peaks.get(process, 0))
            progress.advance(len(group.targets))
    return peaks


def _calibration(weights: Weights, work: Path, config: DecomposeConfig) -> torch.Tensor:
    if config.calibration.source and config.calibration.seq_len > context_of(weights.config):
        raise ConfigError(
            f"calibration.seq_len={config.calibration.seq_len} is longer than the {context_name(weights.config)} of "
            f"model={weights.path}; lower it."
        )
    folder = work / "tokenizer"
    folder.mkdir(exist_ok=True)
    if not copy_tokenizer(weights.path, folder):
        raise ConfigError(f"model={weights.path} has no tokenizer, which whitening needs; add tokenizer.json.")
    return calibration_blocks(config.calibration, folder)


def _reports(groups: list[Group], work: Path) -> list[Report]:
    """Return the reports in every group's file, in the model's order."""
    reports: list[Report] = []
    for group in groups:
        with safe_open(group.result(work), framework="pt") as file:
            reports += json.loads(file.metadata()["layers"])
    return sorted(reports, key=lambda report: _natural(report["name"]))


def _natural(name: str) -> list[tuple[bool, int, str]]:
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]


def low_rank_config(weights: Weights, reports: list[Report]) -> Any:
    """Return transformers' config of the low-rank model, with one rank for each kind whose layers share it."""
    ranks: dict[str, int | None] = dict.fromkeys(LINEAR_KINDS)
    layers: dict[str, int] = {}
    for kind in LINEAR_KINDS:
        of_kind = {report["name"]: report["rank"] for report in reports if report["kind"] == kind}
        if len(set(of_kind.values())) == 1:
            ranks[kind] = next(iter(of_kind.values()))
        else:
            layers |= of_kind
    qkv: Qkv = "separate" if any(report["blocks"] > 1 for report in reports) else "joint"
    return as_low_rank(weights.config, ranks, layers, qkv)


def _assemble(weights: Weights, groups: list[Group], reports: list[Report], work: Path) -> Path:
    """Write the complete model folder (config, weights, tokenizer) inside the work folder and return it."""
    config = low_rank_config(weights, reports)
    names = {name for name, _ in skeleton(config).named_parameters()}
    model = work / "model"
    with TensorFolderWriter(model, over=True, in_parts=True) as writer:
        for group in groups:
            writer.add(load_file(group.result(work)))
        for name in sorted(names - writer.names):  # stays dense; a low-rank layer's bias belongs to B
            writer.add({name: weights.read(name.replace(".B.bias", ".bias"))})
        if writer.names != names:
            odd = sorted(writer.names ^ names)[:5]
            raise CheckpointError(f"{model} holds other weights than its config says: {odd}.")
        writer.finish(config)
        write_manifest(writer.partial)
        copy_tokenizer(weights.path, writer.partial)
        writer.publish()
    return model


def _result(config: DecomposeConfig, weights: Weights, reports: list[Report]) -> dict[str, Any]:
    before = sum(report["out_features"] * report["in_features"] for report in reports)
    after = sum(factor_params(report) for report in reports)
    return {
        "status": "finished",
        "source": str(weights.path),
        "model": str(Path(config.out).expanduser().absolute()),
        "settings": config.model_dump(mode="json", exclude={"out", "workers"}),
        **model_sizes(low_rank_config(weights, reports), weights.config),
        "linear_params_kept": after / before,
        "layers": reports,
    }


def _dry_run(config: DecomposeConfig, weights: Weights, targets: list[Target]) -> dict[str, Any]:
    """Return what is known without factorizing: sizes only if energy does not decide the ranks."""
    reports: list[Report] = [
        {
            "name": target.linear.name,
            "kind": target.linear.kind,
            "out_features": target.linear.out_features,
            "in_features": target.linear.in_features,
            "blocks": target.blocks,
            "rank": target.rank,
            "error": None,
            "error_over_optimal": None,
        }
        for target in targets
    ]
    result: dict[str, Any] = {
        "status": "dry_run",
        "source": str(weights.path),
        "params_dense": parameter_count(weights.config),
    }
    if all(target.rank is not None for target in targets):
        result |= _result(config, weights, reports) | {"status": "dry_run", "model": None}
        log.info(
            f"parameters {result['params_total'] / 1e6:,.2f} M, dense {result['params_dense'] / 1e6:,.2f} M "
            f"({result['compression_ratio']:.2f} x); linear layers keep {result['linear_params_kept']:.1%}"
        )
    else:
        result |= {"params_total": None, "compression_ratio": None, "layers": reports}
        log.info(f"{len(reports)} layers; their ranks come from their spectra")
    return result
