"""What came out of a run: its result, its model folder, a sample of its text."""

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
from finhpc.runs.job import Job, Rows
from finhpc.settings.finetune import TrainingConfig
from finhpc.settings.pretrain import PretrainConfig
from finhpc.training.journal import WORKER_FILE, Record, latest, read

log = logging.getLogger(__name__)


def counted(job: Job) -> dict[str, Any]:
    """Every key of a result, with what can be told without training; the rest is null."""
    parallel = job.config.parallel
    return {
        "status": None,
        "run": job.config.run.name,
        "params_total": None,
        "params_trainable": None,
        "params_dense": None,
        "compression_ratio": None,
        "train_loss": None,
        "val_loss": None,
        "val_perplexity": None,
        "steps": None,
        "tokens": None,
        "tokens_per_s": None,
        "data_wait_fraction": None,
        "pipeline_utilization": None,
        "pipeline_utilization_ideal": parallel.micro_batches / (parallel.stages + parallel.micro_batches - 1),
        "peak_memory_bytes": None,
        "peak_resident_bytes": None,
        "worker_hours": None,
        "consumed_sha256": None,
        "resumed_from_step": None,
        "checkpoint": None,
        "model": None,
        "sample": None,
        "mlflow_run_id": None,
        "tracking_uri": None,
        "wall_s": None,
        **job.counts(),
    }


def collect(job: Job, folder: Path, wall_s: float) -> dict[str, Any]:
    """Write the model folder from the last checkpoint and gather the result of a finished run."""
    from finhpc.training.checkpoint import list_complete

    saved = next(iter(list_complete(folder / "checkpoints")), None)
    if saved is None or saved.step != job.config.train.steps:
        raise CheckpointError(
            f"{folder}/checkpoints holds no checkpoint of the last step; run the same command again to make it."
        )
    saved.verify()
    job.save_model(folder / "model", saved)
    result = _measured(job, folder)
    earlier = earlier_worker_hours(read(folder / WORKER_FILE)[0], time.time() - wall_s)
    result |= {
        "status": "finished",
        "consumed_sha256": saved.manifest["consumed"],
        "checkpoint": str(saved.path),
        "model": str(folder / "model"),
        "wall_s": wall_s,
        "worker_hours": earlier + wall_s * job.config.parallel.workers / 3600,
    }
    return result


def check(job: Job, folder: Path, result: dict[str, Any]) -> None:
    """Raise `ImplausibleError` if a figure of a run that took all its steps cannot be."""
    train = latest(read(folder / WORKER_FILE)[0], "train")
    bound = plausible.after_training(job.vocab_size, train[min(train)]["train_loss"] if train else None)
    plausible.check(
        f"{job.verb} {job.config.run.name}",
        {key: value for key, value in result.items() if key != "data"},
        bound,
        "if the losses on the screen grew, lower optimizer.lr or raise optimizer.warmup_steps under another run.name; "
        "otherwise run the same command again, which evaluates the last checkpoint anew",
    )


def unfinished(job: Job, folder: Path, status: str) -> dict[str, Any]:
    """The result of a run that failed or was stopped."""
    from finhpc.training.checkpoint import list_complete

    saved = next(iter(list_complete(folder / "checkpoints")), None)
    return _measured(job, folder) | {"status": status.lower(), "checkpoint": str(saved.path) if saved else None}


def _measured(job: Job, folder: Path) -> dict[str, Any]:
    """What the journal says: last losses, and the median pace of the newest start."""
    records, _ = read(folder / WORKER_FILE)
    result = counted(job)
    newest = _last_that_trained(records)
    train, evals = latest(records, "train"), latest(records, "eval")
    if train:
        last = train[max(train)]
        result |= {"steps": last["step"], "tokens": last["tokens"], "train_loss": last["train_loss"]}
    if evals:
        last = evals[max(evals)]
        result |= {"val_loss": last["val_loss"], "val_perplexity": last["val_perplexity"]}
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


def _last_that_trained(records: list[Record]) -> list[Record]:
    """The records of the newest start that took a step: one may resume where nothing is left to do."""
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
    """Hours x workers of the starts before the one of unix time `began`, from a start's first record to its last.

    Messages do not count: the next start writes some before it says that it begins, perhaps days later.
    """
    counted = [record for record in records if record["kind"] != "message"]
    before = [start for start in _starts(counted) if start[0]["time"] < began]
    return float(sum((start[-1]["time"] - start[0]["time"]) * start[0]["workers"] for start in before)) / 3600


def sample_text(config: PretrainConfig, model_folder: Path) -> str | None:
    """Text drawn from the model: `train.sample_tokens` after `train.sample_prompt`, seeded."""
    if not config.train.sample_tokens:
        return None
    import torch

    from finhpc.models.files.tokenizer import open_tokenizer
    from finhpc.models.files.tokens import prompt_ids
    from finhpc.models.loading import load_model

    log.info("sampling text from the model")
    model: Any = load_model(model_folder)
    tokenizer = open_tokenizer(model_folder)
    prompt = config.train.sample_prompt or tokenizer.eos_token
    ids = torch.tensor([prompt_ids(tokenizer, prompt)])
    room = model.config.max_position_embeddings - ids.shape[1]
    torch.manual_seed(config.train.seed)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max(1, min(config.train.sample_tokens, room)),
        do_sample=True,
        top_k=40,
        temperature=0.8,
        pad_token_id=tokenizer.eos_token_id,
    )
    return str(tokenizer.decode(out[0], skip_special_tokens=True))


def summary(job: Job, result: dict[str, Any]) -> Rows:
    """The table at the end of a run."""
    rows = [
        *job.rows(),
        ("steps, tokens", f"{result['steps']:,}, {result['tokens']:,}"),
        ("train loss", _number(result["train_loss"], "{:.4f}")),
        ("validation loss", _number(result["val_loss"], "{:.4f}") + job.remark(result)),
        ("tokens/s", _number(result["tokens_per_s"], "{:,.0f}")),
        (
            "pipeline utilisation",
            _number(result["pipeline_utilization"], "{:.2f} measured")
            + f", {result['pipeline_utilization_ideal']:.2f} ideal",
        ),
        ("waiting for data", _number(result["data_wait_fraction"], "{:.1%}")),
        ("peak memory a worker", _memory(result)),
        ("checkpoint", str(result["checkpoint"])),
        ("model", str(result["model"])),
    ]
    if result["sample"]:
        rows.append(("sample", " ".join(result["sample"].split())))
    rows.append(("compare runs", compare_command(job.config)))
    return rows


def dry_summary(job: Job) -> Rows:
    """The table of a dry run, but for what `finhpc.commands.estimate.pretraining` tells."""
    return [
        *job.rows(),
        ("workers", str(job.config.parallel.workers)),
        ("samples a step", str(job.config.parallel.samples_per_step)),
    ]


def lower_batch(config: TrainingConfig, then: str) -> str:
    """What to lower where memory runs out, dearest first; `then`: what comes after the micro-batch."""
    parallel = config.parallel
    precision = "" if config.train.precision == "bf16" else ", use train.precision=bf16"
    return (
        f"lower parallel.micro_batch_size (now {parallel.micro_batch_size}; raise parallel.micro_batches (now "
        f"{parallel.micro_batches}) by as much to keep the batch){then}{precision}, or raise parallel.stages (now "
        f"{parallel.stages}) over more machines."
    )


def compare_command(config: TrainingConfig, *more: str) -> str:
    """How to see the run beside others; the command as it was called here, so that it can be copied."""
    if config.run.tracking_uri and config.run.tracking_uri.startswith("http"):
        return f"open {redact(config.run.tracking_uri)}"
    command = sys.argv[0] if Path(sys.argv[0]).name == "finhpc" else "finhpc"
    uri = config.run.tracking_uri
    where = ["--run.tracking_uri", redact(uri)] if uri else ["--run.storage", config.run.storage]
    return shlex.join([command, "ui", *where, *more])


def _memory(result: dict[str, Any]) -> str:
    peaks, resident = result["peak_memory_bytes"], result["peak_resident_bytes"]
    if not peaks:
        return "not measured"
    tensors = ", ".join(_number(peak and peak / 1e6, "{:,.0f} MB") for peak in peaks)
    return f"tensors {tensors}; resident {', '.join(f'{r / 1e6:,.0f} MB' for r in resident)}"


def millions(count: int) -> str:
    """123,400,000 as 123.40 M."""
    return f"{count / 1e6:,.2f} M"


def _number(value: float | None, form: str) -> str:
    return "not measured" if value is None else form.format(value)
