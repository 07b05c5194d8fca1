"""A step of `reproduce`: measure the size of trained models and their speed of generation.

The MLflow run that trained a model gets `size_bytes` and `generate_tokens_per_s` at the bits it was trained at, and
for every measured width `size_8bit_bytes` and `generate_8bit_tokens_per_s`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

from finhpc.cluster.connect import cluster_resources, ray_cluster
from finhpc.cluster.package import Driver
from finhpc.commands.reproduce.speed import measure_widths, own_bits
from finhpc.errors import ConfigError, FinhpcError, TrainingFailedError
from finhpc.evaluation import plausible
from finhpc.files import redact, write_atomic
from finhpc.models.files.weights import locate
from finhpc.runs.folder import RunFolder
from finhpc.screen import rows_table
from finhpc.settings.base import to_yaml
from finhpc.settings.reproduce import MeasureConfig
from finhpc.tracking.mirror import tracked_run
from finhpc.tracking.store import reason
from finhpc.tracking.writer import RunWriter

FORMAT = 1


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
            measured = _measure_in_worker(config, scratch)
        shutil.rmtree(scratch, ignore_errors=True)
        plausible.check("measuring", {"models": [of for widths in measured.values() for of in widths.values()]})
        for model, widths in measured.items():
            _log(*targets[model], figures(widths, own_bits(model)))
        rows = [{"model": m, "bits": bits} | of for m, widths in measured.items() for bits, of in widths.items()]
        result = {"status": "finished", "models": rows, "sha256": sha256, "wall_s": time.monotonic() - begin}
        folder.write_result(result)
    rows_table("sizes and generation, one prompt", [row | {"model": _short(str(row["model"]))} for row in rows])
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


def _sha256(config: MeasureConfig) -> str:
    """Hash of everything that the figures depend on: settings, and the models' files by size and time of change."""
    files = [
        (str(file), (stat := file.stat()).st_size, stat.st_mtime_ns)
        for model in config.model
        for file in sorted(Path(model).glob("*"))
    ]
    kept = config.model_dump(mode="json", exclude={"run"})
    return hashlib.sha256(json.dumps([FORMAT, kept, files]).encode()).hexdigest()


def _measure_in_worker(config: MeasureConfig, scratch: Path) -> dict[str, dict[int, dict[str, float]]]:
    """Measure in a worker of the cluster, which has its GPUs."""
    import ray
    from ray.exceptions import RayError

    resources, gpus = config.resources, cluster_resources().get("GPU", 0)
    if resources.device == "cuda" and not gpus:
        raise ConfigError(
            "resources.device=cuda, but the cluster has no GPU; use --resources.device cpu, or a cluster with GPUs."
        )
    cuda = resources.device != "cpu" and gpus > 0
    task = ray.remote(
        num_cpus=resources.cpus_per_worker, num_gpus=resources.gpus_per_worker if cuda else 0, max_retries=0
    )(_work)
    try:
        found = ray.get(task.remote(config, scratch, "cuda" if cuda else "cpu", Driver.here()))
    except RayError as error:
        cause = str(error).strip().splitlines()[-1].rstrip(".")
        raise TrainingFailedError(f"the worker that measured died ({cause}); the same command tries again.") from None
    if isinstance(found, FinhpcError):
        raise found
    measured: dict[str, dict[int, dict[str, float]]] = found
    return measured


def _work(
    config: MeasureConfig, scratch: Path, device: str, driver: Driver
) -> dict[str, dict[int, dict[str, float]]] | FinhpcError:
    """User errors are returned: Ray would wrap them."""
    try:
        driver.enter()
        return measure_widths(config, scratch, device)
    except FinhpcError as error:
        return error


def _log(tracking_uri: str, run_id: str, found: dict[str, float]) -> None:
    from mlflow import MlflowClient

    try:
        client = MlflowClient(tracking_uri=tracking_uri)
        # At the last step, so that they follow the sizes that the training counted.
        step = int(client.get_run(run_id).data.metrics.get("steps", 0))
        RunWriter(client, run_id).log_figures(found.items(), step)
    except Exception as error:  # from MLflow or the network
        raise TrainingFailedError(
            f"MLflow at {redact(tracking_uri)} did not accept the sizes and speeds ({reason(error)}); fix this and "
            "rerun the command."
        ) from None


def _short(model: str) -> str:
    """A run's name for its `model`."""
    path = Path(model)
    return path.parent.name if path.name == "model" else path.name
