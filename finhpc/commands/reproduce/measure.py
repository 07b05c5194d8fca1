"""A step of `reproduce`: measure the size of trained models and their speed of generation.

The MLflow run that trained a model gets `size_bytes` and `generate_tokens_per_s` at the bits it was trained at, and
for every measured width `size_8bit_bytes` and `generate_8bit_tokens_per_s`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import statistics
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from finhpc.cluster.connect import cluster_resources, ray_cluster, use_cuda
from finhpc.cluster.tasks import run_tasks
from finhpc.commands.export import export
from finhpc.errors import ConfigError, TrainingFailedError
from finhpc.evaluation import plausible
from finhpc.files import redact, write_atomic
from finhpc.generation.generator import Generator
from finhpc.generation.sampling import decode
from finhpc.models.files.source import config_of, locate
from finhpc.models.lora.peft_format import CONFIG as ADAPTER
from finhpc.models.lora.peft_format import QUANTIZED
from finhpc.quantization.fake import trained_bits
from finhpc.runs.folder import RunFolder
from finhpc.screen import rows_table
from finhpc.settings.base import to_yaml
from finhpc.settings.export import ExportConfig, ExportQuantization
from finhpc.settings.generate import GenerateConfig, Sampling
from finhpc.settings.reproduce import MeasureConfig
from finhpc.tracking.mirror import tracked_run
from finhpc.tracking.store import reason
from finhpc.tracking.writer import RunWriter

WARM_UP = 2  # tokens


def measure(config: MeasureConfig) -> dict[str, Any]:
    """Measure every model and log the figures; returns the content of the run folder's result.json.

    Nothing is measured again if neither models nor settings have changed. Raises `ConfigError` for models that cannot
    be used or that come from no run, `TrainingFailedError` if MLflow does not take the figures.
    """
    begin = time.monotonic()
    folder = RunFolder(config.run.storage, config.run.name)
    config = config.model_copy(update={"model": [str(locate(model)) for model in config.model]})
    targets = _targets(config)
    with folder.lock():
        sha256 = _sha256(config)
        before = folder.result()
        if before and before.get("sha256") == sha256:
            return before
        run = config.run.model_copy(update={"tracking_uri": redact(config.run.tracking_uri or "") or None})
        write_atomic(folder.path / "config.yaml", to_yaml(config.model_copy(update={"run": run})))
        scratch = folder.path / "exports"
        shutil.rmtree(scratch, ignore_errors=True)
        with ray_cluster():
            cuda, resources = use_cuda(config.resources, cluster_resources()), config.resources
            work = partial(measure_widths, scratch=scratch, device="cuda" if cuda else "cpu")
            gpus = resources.gpus_per_worker if cuda else 0
            tasks = run_tasks(work, [config], lambda _: "measuring", 1, resources.cpus_per_worker, gpus)
            ((_, measured),) = tasks
        shutil.rmtree(scratch, ignore_errors=True)
        plausible.check("measuring", {"models": [of for widths in measured.values() for of in widths.values()]})
        for model, widths in measured.items():
            _log(*targets[model], figures(widths, own_bits(model)))
        rows = [{"model": m, "bits": bits} | of for m, widths in measured.items() for bits, of in widths.items()]
        result = {"status": "finished", "models": rows, "sha256": sha256, "wall_s": time.monotonic() - begin}
        folder.write_result(result)
    paths = [Path(str(row["model"])) for row in rows]
    names = [path.parent.name if path.name == "model" else path.name for path in paths]
    shown = [row | {"model": name} for row, name in zip(rows, names, strict=True)]
    rows_table("sizes and generation, one prompt", shown)
    return result


def figures(widths: dict[int, dict[str, float]], own: int) -> dict[str, float]:
    """Metric -> value of one model: at its own bits under plain names, at every width under names with the bits."""
    metrics = dict(widths[own])
    for bits, of in widths.items():
        metrics |= {f"{name.partition('_')[0]}_{bits}bit_{name.partition('_')[2]}": value for name, value in of.items()}
    return metrics


def _targets(config: MeasureConfig) -> dict[str, tuple[str, str]]:
    """Model -> the address of MLflow and the run for its figures; raises one `ConfigError` with every problem."""
    ours = config.run.mlflow_uri
    targets, problems = {}, []
    if config.mlflow_run_id and len(config.model) > 1:
        problems.append(f"mlflow_run_id is one run, and there are {len(config.model)} models; measure one at a time.")
    for model in config.model:
        if config.mlflow_run_id:
            targets[model] = (ours, config.mlflow_run_id)
        elif tracked := tracked_run(Path(model).absolute().parent, ours):
            targets[model] = tracked
        else:
            problems.append(f"model={model} does not come from a run in MLflow; give mlflow_run_id.")
    if problems:
        raise ConfigError(problems)
    return targets


def _log(tracking_uri: str, run_id: str, metrics: dict[str, float]) -> None:
    from mlflow import MlflowClient

    try:
        client = MlflowClient(tracking_uri=tracking_uri)
        # At the last step, so that they follow the sizes that the training counted.
        step = int(client.get_run(run_id).data.metrics.get("steps", 0))
        RunWriter(client, run_id).log_figures(metrics.items(), step)
    except Exception as error:  # from MLflow or the network
        raise TrainingFailedError(
            f"MLflow at {redact(tracking_uri)} did not accept the sizes and speeds ({reason(error)}); fix this and "
            "rerun the command."
        ) from None


def _sha256(config: MeasureConfig) -> str:
    """Hash of everything that the figures depend on: settings, and the models' files by size and time of change."""
    stats = [(file, file.stat()) for model in config.model for file in sorted(Path(model).glob("*"))]
    files = [(str(file), stat.st_size, stat.st_mtime_ns) for file, stat in stats]
    return hashlib.sha256(json.dumps([config.model_dump(mode="json", exclude={"run"}), files]).encode()).hexdigest()


@dataclass
class Width:
    """A model at some bits: the folder it is exported to, its size there, and the seconds of generation per round."""

    model: str
    bits: int
    folder: Path
    size_bytes: int = 0
    seconds: list[float] = field(default_factory=list)

    def figures(self, new: int) -> dict[str, float]:
        return {"size_bytes": self.size_bytes, "generate_tokens_per_s": new / statistics.median(self.seconds)}


def own_bits(model: str) -> int:
    """The bits at which a model was trained; for an adapter, those of its base."""
    folder = Path(model)
    if (folder / ADAPTER).is_file():
        kept = folder / QUANTIZED
        return int(json.loads(kept.read_text(encoding="utf-8"))["bits"]) if kept.is_file() else 16
    return trained_bits(config_of(folder))


def measure_widths(config: MeasureConfig, scratch: Path, device: str) -> dict[str, dict[int, dict[str, float]]]:
    """Model -> bits -> `size_bytes`, and `generate_tokens_per_s` of one prompt; in turn, with one model in memory.

    Models are exported into `scratch`, in bfloat16, below 16 bits per vector (`minmax`), and adapters merged into
    their base. `device`: cpu or cuda. Raises `ConfigError` and `CheckpointError` as export and generate do.
    """
    widths = [
        _exported(Width(model, bits, scratch / f"{number}-{bits}"))
        for number, model in enumerate(config.model)
        for bits in dict.fromkeys([own_bits(model), *config.bits])
    ]
    for round_ in range(config.rounds):
        for width in widths if round_ % 2 == 0 else widths[::-1]:
            width.seconds.append(_seconds(width.folder, config, device))
    measured: dict[str, dict[int, dict[str, float]]] = {model: {} for model in config.model}
    for width in widths:
        measured[width.model][width.bits] = width.figures(config.new)
        shutil.rmtree(width.folder)
    return measured


def _exported(width: Width) -> Width:
    adapter = (Path(width.model) / ADAPTER).is_file()
    settings = ExportConfig(
        model=width.model,
        out=str(width.folder),
        format="merged" if adapter else "native",
        dtype="bfloat16",
        quantization=ExportQuantization(bits=width.bits),  # type: ignore[arg-type]
    )
    width.size_bytes = export(settings)["size_bytes"]
    return width


def _seconds(folder: Path, config: MeasureConfig, device: str) -> float:
    resources = config.resources.model_copy(update={"device": device})
    sampling = Sampling(max_new_tokens=config.new, stop_at_eos=False)
    generator = Generator(GenerateConfig(model=str(folder), dtype="bfloat16", sampling=sampling, resources=resources))
    draw = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, generator.model.config.vocab_size, (config.prompt,), generator=draw).tolist()
    for _ in decode(generator.decoder, [prompt], Sampling(max_new_tokens=WARM_UP)):
        pass
    begin = time.perf_counter()
    for _ in decode(generator.decoder, [prompt], sampling):
        pass
    return time.perf_counter() - begin
