"""A step of `reproduce`: measure the size of trained models and their speed of generation.

The MLflow run that trained a model gets `size_bytes` and `generate_tokens_per_s` at the bits it was trained at, and
for every measured width `size_8bit_bytes` and `generate_8bit_tokens_per_s`.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from finhpc.cluster.connect import cluster_resources, ray_cluster, use_cuda
from finhpc.cluster.tasks import run_tasks
from finhpc.commands.export import export
from finhpc.errors import ConfigError, TrainingFailedError
from finhpc.evaluation import plausible
from finhpc.files import file_stamps, json_sha256, redact
from finhpc.generation.decode import decode
from finhpc.generation.generator import Generator
from finhpc.models.files.source import config_of, locate
from finhpc.models.lora.peft_format import CONFIG as ADAPTER
from finhpc.models.lora.peft_format import QUANTIZED
from finhpc.quantization.fake import trained_bits
from finhpc.runs.folder import RunFolder
from finhpc.screen import rows_table
from finhpc.settings.export import ExportConfig, ExportQuantization
from finhpc.settings.generate import GenerateConfig, Sampling
from finhpc.settings.reproduce import MeasureConfig
from finhpc.tracking.describe import short_name
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
        stamps = file_stamps([file for model in config.model for file in sorted(Path(model).glob("*"))])
        sha256 = json_sha256([config.model_dump(mode="json", exclude={"run"}), stamps])
        before = folder.result()
        if before and before.get("sha256") == sha256:
            return before
        folder.write_settings(config)
        scratch = folder.path / "exports"
        shutil.rmtree(scratch, ignore_errors=True)
        with ray_cluster():
            cuda, resources = use_cuda(config.resources, cluster_resources()), config.resources
            work = partial(measure_widths, scratch=scratch, device="cuda" if cuda else "cpu")
            gpus = resources.gpus_per_worker if cuda else 0
            ((_, measured),) = run_tasks(work, [config], lambda _: "measuring", 1, resources.cpus_per_worker, gpus)
        shutil.rmtree(scratch, ignore_errors=True)
        plausible.check("measuring", {"models": [of for widths in measured.values() for of in widths.values()]})
        for model, widths in measured.items():
            _log(*targets[model], figures(widths, own_bits(model)))
        rows = [{"model": m, "bits": bits} | of for m, widths in measured.items() for bits, of in widths.items()]
        result = {"status": "finished", "models": rows, "sha256": sha256, "wall_s": time.monotonic() - begin}
        folder.write_result(result)
    rows_table("sizes and generation, one prompt", [row | {"model": short_name(str(row["model"]))} for row in rows])
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
    folders: dict[tuple[str, int], Path] = {}
    sizes: dict[tuple[str, int], int] = {}
    for number, model in enumerate(config.model):
        for bits in dict.fromkeys([own_bits(model), *config.bits]):
            folder = folders[model, bits] = scratch / f"{number}-{bits}"
            settings = ExportConfig(
                model=model,
                out=str(folder),
                format="merged" if (Path(model) / ADAPTER).is_file() else "native",
                dtype="bfloat16",
                quantization=ExportQuantization(bits=bits),  # type: ignore[arg-type]
            )
            sizes[model, bits] = export(settings)["size_bytes"]
    seconds: dict[tuple[str, int], list[float]] = {width: [] for width in folders}
    for round_ in range(config.rounds):
        for width in list(folders) if round_ % 2 == 0 else reversed(folders):
            seconds[width].append(_seconds(folders[width], config, device))
    measured: dict[str, dict[int, dict[str, float]]] = {model: {} for model in config.model}
    for (model, bits), folder in folders.items():
        speed = config.new / statistics.median(seconds[model, bits])
        measured[model][bits] = {"size_bytes": sizes[model, bits], "generate_tokens_per_s": speed}
        shutil.rmtree(folder)
    return measured


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
