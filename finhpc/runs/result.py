"""The result of a run: the keys of `result.json`, and the table at the end."""

from __future__ import annotations

import logging
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from finhpc.errors import CheckpointError
from finhpc.evaluation import plausible
from finhpc.files import redact
from finhpc.models.schedule import ideal_utilization
from finhpc.runs.job import Job
from finhpc.runs.launch import UseModel
from finhpc.settings.training import TrainingConfig
from finhpc.training.journal import WORKER_FILE, Record, latest, read

log = logging.getLogger(__name__)

KEYS = (
    *("status", "run", "params_total", "params_trainable", "params_dense", "compression_ratio"),
    *("train_loss", "val_loss", "val_perplexity", "final_val_loss", "final_val_loss_se", "final_val_tokens"),
    *("steps", "tokens", "tokens_per_s", "data_wait_fraction", "pipeline_utilization", "pipeline_utilization_ideal"),
    *("peak_memory_bytes", "peak_resident_bytes", "worker_hours"),
    *("consumed_sha256", "resumed_from_step", "checkpoint", "model", "model_step", "stopped_early", "sample"),
    *("mlflow_run_id", "tracking_uri", "wall_s"),
)  # of a result, in this order; a job adds its own


def empty_result(job: Job) -> dict[str, Any]:
    """Every key of a result; those that are unknown before training are None."""
    parallel = job.config.parallel
    return {
        **dict.fromkeys(KEYS),
        "run": job.config.run.name,
        "pipeline_utilization_ideal": ideal_utilization(parallel.schedule, parallel.stages, parallel.micro_batches),
        **job.counts(),
    }


def collect(job: Job, folder: Path, wall_s: float, use_model: UseModel) -> dict[str, Any]:
    """Write the model folder from the last checkpoint, use the model, and return the result of a finished run.

    `use_model` calls the job's method of that name where a worker has run.
    Raises `ImplausibleError` for figures that cannot be true.
    """
    from finhpc.training.checkpoint import BEST_STEP, STOPPED_EARLY, list_complete, open_checkpoint

    checkpoint = next(iter(list_complete(folder / "checkpoints")), None)
    early = checkpoint is not None and bool(checkpoint.manifest.get(STOPPED_EARLY))
    if checkpoint is None or not (early or checkpoint.step == job.config.train.steps):
        raise CheckpointError(
            f"{folder}/checkpoints has no checkpoint of the last step; run the same command again to write it."
        )
    checkpoint.check_sizes()  # the workers wrote or verified it just now
    chosen = checkpoint
    if BEST_STEP in checkpoint.manifest:
        chosen = open_checkpoint(folder / "checkpoints" / f"step_{checkpoint.manifest[BEST_STEP]:08d}")
        chosen.check_sizes()
    job.save_model(folder / "model", chosen)
    records, _ = read(folder / WORKER_FILE)
    earlier = earlier_worker_hours(records, time.time() - wall_s)
    result = (
        _measured(job, records)
        | _losses(latest(records, "eval").get(chosen.step))
        | {
            "status": "finished",
            "consumed_sha256": checkpoint.manifest["consumed"],
            "checkpoint": str(checkpoint.path),
            "model": str(folder / "model"),
            "model_step": chosen.step,
            "stopped_early": early,
            "wall_s": wall_s,
            "worker_hours": earlier + wall_s * job.config.parallel.workers / 3600,
        }
    )
    if job.model_use:
        log.info(job.model_use)
        result |= use_model()
    train = latest(records, "train")
    plausible.check(
        f"{job.command} {job.config.run.name}",
        {key: value for key, value in result.items() if key != "data"},
        plausible.after_training(int(job.hf_config.vocab_size), train[min(train)]["train_loss"] if train else None),
        "if the losses on the screen grew, lower optimizer.lr or raise optimizer.warmup_steps under another run.name; "
        "otherwise run the same command again, which evaluates the last checkpoint again",
    )
    return result


def unfinished(job: Job, folder: Path, status: str) -> dict[str, Any]:
    """The result of a run that failed or was stopped."""
    from finhpc.training.checkpoint import list_complete

    records, _ = read(folder / WORKER_FILE)
    checkpoint = next((str(checkpoint.path) for checkpoint in list_complete(folder / "checkpoints")), None)
    return _measured(job, records) | {"status": status.lower(), "checkpoint": checkpoint}


def _measured(job: Job, records: list[Record]) -> dict[str, Any]:
    """The result with the journal's last losses and the median speed of the newest start."""
    result = empty_result(job)
    newest = last_that_trained(records)
    train, evals = latest(records, "train"), latest(records, "eval")
    if train:
        last = train[max(train)]
        result |= {"steps": last["step"], "tokens": last["tokens"], "train_loss": last["train_loss"]}
    if evals:
        result |= _losses(evals[max(evals)])
    steps = [record for record in newest if record["kind"] == "train"]
    for key in ("tokens_per_s", "pipeline_utilization", "data_wait_fraction"):
        values = sorted(record[key] for record in steps if key in record)
        result[key] = values[len(values) // 2] if values else None
    for record in newest:
        if record["kind"] == "memory":
            result |= {key: record[key] for key in ("peak_memory_bytes", "peak_resident_bytes")}
        elif record["kind"] == "start" and record["step"]:
            result["resumed_from_step"] = record["step"]
    return result


def _losses(evaluation: Record | None) -> dict[str, Any]:
    return {key: evaluation[key] for key in ("val_loss", "val_perplexity")} if evaluation else {}


def last_that_trained(records: list[Record]) -> list[Record]:
    """The records of the newest start that took a step: a later one may have had nothing left to do."""
    starts = _starts(records)
    trained = [start for start in starts if any(record["kind"] == "train" for record in start)]
    return (trained or starts or [[]])[-1]


def _starts(records: list[Record]) -> list[list[Record]]:
    """The records of each start of the workers."""
    starts: list[list[Record]] = []
    for record in records:
        if record["kind"] == "start":
            starts.append([])
        if starts:
            starts[-1].append(record)
    return starts


def earlier_worker_hours(records: list[Record], began: float) -> float:
    """Hours x workers of the starts before unix time `began`, from a start's first record to its last.

    Messages do not count: the next start logs some before its own first record, perhaps days later.
    """
    events = [record for record in records if record["kind"] != "message"]
    before = [start for start in _starts(events) if start[0]["time"] < began]
    return float(sum((start[-1]["time"] - start[0]["time"]) * start[0]["workers"] for start in before)) / 3600


def summary(job: Job, result: dict[str, Any]) -> list[tuple[str, str]]:
    """The rows of the table at the end of a run."""
    utilization, ideal = result["pipeline_utilization"], result["pipeline_utilization_ideal"]
    memory = "not measured"
    if peaks := result["peak_memory_bytes"]:
        tensors = ", ".join(_number(peak and peak / 1e6, "{:,.0f} MB") for peak in peaks)
        memory = f"tensors {tensors}; resident {', '.join(f'{r / 1e6:,.0f} MB' for r in result['peak_resident_bytes'])}"
    rows = [
        *job.summary(),
        ("steps, tokens", f"{result['steps']:,}, {result['tokens']:,}"),
        ("train loss", _number(result["train_loss"], "{:.4f}")),
        ("validation loss", _number(result["val_loss"], "{:.4f}") + job.loss_note(result)),
        ("tokens/s", _number(result["tokens_per_s"], "{:,.0f}")),
        ("pipeline utilization", f"{_number(utilization, '{:.2f} measured')}, {ideal:.2f} ideal"),
        ("waiting for data", _number(result["data_wait_fraction"], "{:.1%}")),
        ("peak memory per worker", memory),
        ("checkpoint", str(result["checkpoint"])),
        ("model", str(result["model"]) + _of_step(result)),
    ]
    if result["sample"]:
        rows.append(("sample", " ".join(result["sample"].split())))
    rows.append(("compare runs", compare_command(job.config)))
    return rows


def _of_step(result: dict[str, Any]) -> str:
    """Which step the model is of, if it is not the last one."""
    if result["model_step"] in (None, result["steps"]):
        return ""
    return f", of step {result['model_step']:,}, the best evaluation"


def lower_batch(config: TrainingConfig, then: str) -> str:
    """Advice for a run whose memory ran out, the most effective first; `then`: what to lower after the micro-batch."""
    parallel = config.parallel
    precision = "" if config.train.products == "bf16" else ", use train.precision=bf16"
    return (
        f"lower parallel.micro_batch_size (now {parallel.micro_batch_size}; raise parallel.micro_batches (now "
        f"{parallel.micro_batches}) by as much to keep the batch){then}{precision}, or raise parallel.stages (now "
        f"{parallel.stages}) over more machines."
    )


def compare_command(config: TrainingConfig, *more: str) -> str:
    """The command that compares the run with others, as it was called here, so that it can be copied."""
    if config.run.tracking_uri and config.run.tracking_uri.startswith("http"):
        return f"open {redact(config.run.tracking_uri)}"
    command = sys.argv[0] if Path(sys.argv[0]).name == "finhpc" else "finhpc"
    uri = config.run.tracking_uri
    where = ["--run.tracking_uri", redact(uri)] if uri else ["--run.storage", config.run.storage]
    return shlex.join([command, "ui", *where, *more])


def millions(count: int) -> str:
    """123,400,000 as 123.40 M."""
    return f"{count / 1e6:,.2f} M"


def _number(value: float | None, form: str) -> str:
    return "not measured" if value is None else form.format(value)
