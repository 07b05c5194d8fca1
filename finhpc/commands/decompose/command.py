"""A dense model -> a low-rank one of its best factors: `finhpc decompose` (FinGPT-HPC, sections III.C and IV.B).

Ray tasks factorise groups of layers, each into a file of `OUT.partial`, so an interrupted run
continues. Then the files are copied into one model folder, which takes its name last. Weights are read
one at a time and never held together.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from finhpc.cluster.connect import cluster_resources, ray_cluster
from finhpc.cluster.package import Driver
from finhpc.commands.decompose.layer_groups import (
    Group,
    Job,
    Report,
    Target,
    group_task,
    groups_of,
    mend,
    peak_memory_bytes,
    targets_of,
    with_moments,
)
from finhpc.commands.decompose.merge import header_of, merge_model, save_atomic
from finhpc.commands.decompose.spectra import draw, save_spectra, summary
from finhpc.data.text.calibration import calibration_blocks
from finhpc.errors import CheckpointError, ConfigError, DataError, RunBusyError
from finhpc.evaluation import plausible
from finhpc.files import private_folder, publish, write_atomic
from finhpc.models.families.registry import (
    as_low_rank,
    context_name,
    context_of,
    model_sizes,
    parameter_count,
    skeleton,
)
from finhpc.models.files.manifest import check_manifest, write_manifest
from finhpc.models.files.tokenizer import find_tokenizer
from finhpc.models.files.tokens import check_rows
from finhpc.models.files.weights import Weights, locate, open_weights
from finhpc.screen import Progress
from finhpc.settings.decompose import DecomposeConfig
from finhpc.settings.pretrain import LINEAR_KINDS
from finhpc.training.allocator import give_back_freed_memory

log = logging.getLogger(__name__)

FORMAT = 1
RESULT = "result.json"
REST_BYTES = 64 << 20  # of the tensors that stay dense, written together


def decompose(config: DecomposeConfig, dry_run: bool = False) -> dict[str, Any]:
    """Write a low-rank model folder of `config.model` to `config.out`; returns what its result.json holds.

    Continues an interrupted run of the same settings, and only reports where it is already done. With
    `dry_run` it checks and counts, and writes nothing. Starts a local Ray where none runs. Raises
    `ConfigError` for settings, models and texts that cannot work, `CheckpointError` for weights that
    cannot be read or are not finite, `RunBusyError` where another process writes the same folder.
    """
    began = time.monotonic()
    if not config.out:
        raise ConfigError("out is not set; give --out with a folder for the low-rank model.")
    source, out = locate(config.model), Path(config.out).expanduser().absolute()
    settings = settings_sha256(config, source)
    if (done := _finished(out, settings)) is not None:
        return done
    check_manifest(source)
    weights = open_weights(source)
    if (tokenizer := find_tokenizer(source)) is not None:
        check_rows(tokenizer, weights.config.vocab_size, f"model={source}")
    targets = targets_of(weights, config)
    if dry_run:
        return _dry(config, weights, targets)
    with _workplace(out, settings) as work:
        with ray_cluster():
            cuda = _use_cuda(config)
            groups = groups_of(targets, weights, config.whiten, cuda)
            job = Job(source, settings, work, config.keep_energy, config.resources.threads, cuda, Driver.here())
            factorise_began = time.monotonic()
            peaks = _factorise(groups, weights, job, config)
        factorise_s = time.monotonic() - factorise_began
        reports = _reports(groups, work)
        model = _assemble(weights, groups, reports, work)
        result = _result(config, weights, reports) | {
            "peak_memory_bytes": [peak_memory_bytes(False), *peaks.values()],
            "factorise_s": factorise_s,
            "wall_s": time.monotonic() - began,
            "settings_sha256": settings,
        }
        save_spectra(groups, work, model / "spectra.npz")
        draw(model / "spectra.npz", reports, model / "spectra.png")
        plausible.check(f"decompose {config.model}", result)
        write_atomic(model / RESULT, json.dumps(result, indent=1).encode() + b"\n")
        publish(model, out)
    shutil.rmtree(work)
    summary(result)
    return result


def settings_sha256(config: DecomposeConfig, source: Path) -> str:
    """One hash of everything the factors depend on: settings, and every input file's size and time of change."""
    named = [source, *(Path(text) for text in config.calibration.source)]
    files = [file for path in named for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    stamps = [(str(file), (s := file.stat()).st_size, s.st_mtime_ns) for file in files if file.is_file()]
    kept = config.model_dump(exclude={"out", "workers", "resources", "model"})
    return hashlib.sha256(json.dumps([FORMAT, kept, config.resources.device, stamps]).encode()).hexdigest()


def _finished(out: Path, settings: str) -> dict[str, Any] | None:
    """The result of an earlier run with the same settings, if `out` holds it."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not out.is_dir():
        raise ConfigError(f"out={out} is a file; give a folder.")
    stored = out / RESULT
    result: dict[str, Any] = json.loads(stored.read_bytes()) if stored.is_file() else {}
    if "settings_sha256" not in result:
        raise ConfigError(f"out={out} holds other files; choose an empty or new folder.")
    if result["settings_sha256"] != settings:
        raise ConfigError(
            f"out={out} already holds a model decomposed with other settings or from another one ({RESULT} says "
            "which); choose another --out, or remove that folder."
        )
    # Left where the command was killed at the very end.
    shutil.rmtree(out.with_name(out.name + ".partial"), ignore_errors=True)
    log.info(f"{out} is already decomposed with these settings; nothing to do")
    return result


@contextmanager
def _workplace(out: Path, settings: str) -> Iterator[Path]:
    """`OUT.partial`, locked for this process, with what an earlier run of the same settings left there."""
    work = out.with_name(out.name + ".partial")
    try:
        private_folder(work)
    except OSError as error:
        raise ConfigError(f"out={out} cannot be written ({error.strerror}); choose another --out.") from None
    with open(work / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunBusyError(f"out={out} is being written by another process; wait for it.") from None
        key = work / "settings"
        if key.is_file() and key.read_text() != settings:
            log.info(f"{out}: an unfinished run had other settings; what it left is discarded")
            for path in [path for path in work.iterdir() if path.name != "lock"]:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        write_atomic(key, settings.encode())
        try:
            yield work
        except (ConfigError, DataError):  # mending that makes it another run
            shutil.rmtree(work)
            raise


def _use_cuda(config: DecomposeConfig) -> bool:
    gpus = cluster_resources().get("GPU", 0)
    if config.resources.device == "cuda" and not gpus:
        raise ConfigError(
            "resources.device=cuda, but the cluster has no GPU; use --resources.device cpu, or a cluster with GPUs."
        )
    return config.resources.device != "cpu" and gpus > 0


def _factorise(groups: list[Group], weights: Weights, job: Job, config: DecomposeConfig) -> dict[int, int]:
    """Every group that has no file yet, in parallel; returns process -> peak memory in bytes."""
    pending = [group for group in groups if not group.result(job.work).is_file()]
    if len(pending) < len(groups):
        done = sum(len(group.targets) for group in groups) - sum(len(group.targets) for group in pending)
        log.info(f"continuing: {done} of {sum(len(group.targets) for group in groups)} layers are done")
    peaks: dict[int, int] = {}
    if not pending:
        return peaks
    ready: Iterator[Group] = iter(pending)
    give_back_freed_memory()
    if config.whiten:
        tokens = _calibration(weights, job, config)
        torch.set_num_threads(config.resources.threads)
        ready = with_moments(pending, weights, tokens, job.work, torch.device("cuda" if job.cuda else "cpu"))
    with Progress("factorising", sum(len(group.targets) for group in pending), bytes_=False) as progress:
        for group, row in _run_tasks(ready, job, config):
            if row["error"]:
                kind = {"ConfigError": ConfigError, "DataError": DataError}.get(row["kind"], CheckpointError)
                raise kind(row["error"])
            peaks[row["pid"]] = max(row["peak_memory_bytes"], peaks.get(row["pid"], 0))
            progress.advance(len(group.targets))
    return peaks


def _calibration(weights: Weights, job: Job, config: DecomposeConfig) -> torch.Tensor:
    if config.calibration.source and config.calibration.seq_len > context_of(weights.config):
        raise ConfigError(
            f"calibration.seq_len={config.calibration.seq_len} is longer than the {context_name(weights.config)} of "
            f"model={weights.path}; lower it."
        )
    folder = job.work / "tokenizer"
    folder.mkdir(exist_ok=True)
    if not weights.save_tokenizer(folder):
        raise ConfigError(f"model={weights.path} comes without a tokenizer, which whitening needs; add tokenizer.json.")
    return calibration_blocks(config.calibration, folder)


def _run_tasks(ready: Iterator[Group], job: Job, config: DecomposeConfig) -> Iterator[tuple[Group, Report]]:
    """One row a group, as soon as it is done; `ready` is asked for more only when a worker is free."""
    import ray
    from ray.exceptions import RayError

    resources = config.resources
    task = ray.remote(num_cpus=resources.cpus_per_worker, num_gpus=resources.gpus_per_worker if job.cuda else 0)(
        group_task
    )
    places = cluster_resources().get("CPU", 1) / resources.cpus_per_worker
    if job.cuda:
        places = min(places, cluster_resources().get("GPU", 1) / resources.gpus_per_worker)
    if places < 1:
        raise ConfigError(
            f"resources.cpus_per_worker={resources.cpus_per_worker:g} is more than the cluster has; use fewer."
        )
    # One more than run at a time, so that a worker that ends one has the next at hand.
    width = config.workers or int(places) + 1
    running: dict[Any, Group] = {}
    try:
        while True:
            for group in islice(ready, width - len(running)):
                running[task.remote(job, group)] = group
            if not running:
                return
            for done in ray.wait(list(running), num_returns=1)[0]:
                group = running.pop(done)
                try:
                    yield group, ray.get(done)
                except RayError as error:  # the task's process died, more often than Ray tries again
                    reason = str(error).strip().splitlines()[0].rstrip(".")
                    yield group, {"error": mend(group, type(error).__name__, reason), "kind": ""}
    finally:
        for left in running:
            ray.cancel(left)


def _reports(groups: list[Group], work: Path) -> list[Report]:
    """What every group's file says of its layers, in the model's order."""
    found: list[Report] = []
    for group in groups:
        with safe_open(group.result(work), framework="pt") as file:
            found += json.loads(file.metadata()["layers"])
    return sorted(found, key=lambda report: _natural(report["name"]))


def _natural(name: str) -> list[tuple[bool, int, str]]:
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]


def low_rank_config(weights: Weights, reports: list[Report]) -> Any:
    """transformers' config of the low-rank model: one rank for a kind where all its layers share it."""
    ranks: dict[str, int | None] = dict.fromkeys(LINEAR_KINDS)
    layers: dict[str, int] = {}
    for kind in LINEAR_KINDS:
        of_kind = {report["name"]: report["rank"] for report in reports if report["kind"] == kind}
        if len(set(of_kind.values())) == 1:
            ranks[kind] = next(iter(of_kind.values()))
        else:
            layers |= of_kind
    return as_low_rank(weights.config, ranks, layers)


def _assemble(weights: Weights, groups: list[Group], reports: list[Report], work: Path) -> Path:
    """The whole model folder, still under the work folder: config, weights, tokeniser."""
    config = low_rank_config(weights, reports)
    factors = {name for group in groups for name in header_of(group.result(work)) if name != "__metadata__"}
    names = [name for name, _ in skeleton(config).named_parameters()]
    rest = _copy_rest([name for name in names if name not in factors], weights, work)
    model = work / "model"
    shutil.rmtree(model, ignore_errors=True)
    model.mkdir()
    written = merge_model([*(group.result(work) for group in groups), *rest], model)
    if written != set(names):
        raise CheckpointError(f"{model} holds other weights than its config says: {sorted(written ^ set(names))[:5]}.")
    write_manifest(model)
    config.save_pretrained(model)
    weights.save_tokenizer(model)
    return model


def _copy_rest(names: list[str], weights: Weights, work: Path) -> list[Path]:
    """What stays dense, a few tensors a file."""
    paths: list[Path] = []
    held: dict[str, torch.Tensor] = {}
    for i, name in enumerate(names):
        held[name] = weights.read(name)
        if i == len(names) - 1 or sum(tensor.nbytes for tensor in held.values()) >= REST_BYTES:
            paths.append(work / f"rest-{len(paths):05d}.safetensors")
            save_atomic(held, paths[-1], {})
            held = {}
    return paths


def _result(config: DecomposeConfig, weights: Weights, reports: list[Report]) -> dict[str, Any]:
    before = sum(report["out_features"] * report["in_features"] for report in reports)
    after = sum((report["out_features"] + report["in_features"]) * report["rank"] for report in reports)
    return {
        "status": "finished",
        "source": str(weights.path),
        "model": str(Path(config.out).expanduser().absolute()),
        "settings": config.model_dump(mode="json", exclude={"out", "workers"}),
        **model_sizes(low_rank_config(weights, reports), weights.config),
        "linear_params_kept": after / before,
        "layers": reports,
    }


def _dry(config: DecomposeConfig, weights: Weights, targets: list[Target]) -> dict[str, Any]:
    """What can be told without factorising: nothing of the size where energy decides the ranks."""
    reports: list[Report] = [
        {
            "name": target.linear.name,
            "kind": target.linear.kind,
            "out_features": target.linear.out_features,
            "in_features": target.linear.in_features,
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
