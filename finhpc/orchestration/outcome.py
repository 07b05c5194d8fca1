"""What came out of a run: its result, its model folder, a sample of its text."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finhpc.config import PretrainConfig
from finhpc.errors import CheckpointError
from finhpc.orchestration.plan import Plan
from finhpc.orchestration.runfolder import redact
from finhpc.training.journal import WORKER_FILE, Record, latest, read


def counted(plan: Plan) -> dict[str, Any]:
    """Every key of a result, with what can be told without training; the rest is null."""
    parallel = plan.config.parallel
    return {
        "status": None,
        "run": plan.config.run.name,
        "params_total": plan.params_total,
        "params_trainable": plan.params_total,
        "params_dense": plan.params_dense,
        "compression_ratio": plan.compression_ratio,
        "train_loss": None,
        "val_loss": None,
        "val_perplexity": None,
        "val_unigram_entropy": plan.shards.manifest.val_unigram_entropy_nats,
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
    }


def collect(plan: Plan, folder: Path, wall_s: float) -> dict[str, Any]:
    """Write the model folder from the last checkpoint and gather the result of a finished run."""
    from finhpc.models.loading import save_model
    from finhpc.training.checkpoint import complete, read_stage

    saved = next(iter(complete(folder / "checkpoints")), None)
    if saved is None or saved.step != plan.config.train.steps:
        raise CheckpointError(
            f"{folder}/checkpoints holds no checkpoint of the last step; run the same command again to make it."
        )
    saved.verify()
    shards = [lambda file=file: read_stage(file, "param") for file in saved.stage_files()]  # type: ignore[misc]
    plan.shards.check_tokenizer()  # it goes into the model's folder
    save_model(folder / "model", plan.hf_config, shards, plan.shards.tokenizer)
    result = _measured(plan, folder)
    result |= {
        "status": "finished",
        "consumed_sha256": saved.manifest["consumed"],
        "checkpoint": str(saved.path),
        "model": str(folder / "model"),
        "wall_s": wall_s,
        "worker_hours": wall_s * plan.config.parallel.workers / 3600,
    }
    return result


def unfinished(plan: Plan, folder: Path, status: str) -> dict[str, Any]:
    """The result of a run that failed or was stopped."""
    from finhpc.training.checkpoint import complete

    saved = next(iter(complete(folder / "checkpoints")), None)
    return _measured(plan, folder) | {"status": status.lower(), "checkpoint": str(saved.path) if saved else None}


def _measured(plan: Plan, folder: Path) -> dict[str, Any]:
    """What the journal says: last losses, and the median pace of the newest start."""
    records, _ = read(folder / WORKER_FILE)
    result = counted(plan)
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
    starts: list[list[Record]] = []
    for record in records:
        if record["kind"] == "start":
            starts.append([])
        if starts:
            starts[-1].append(record)
    trained = [start for start in starts if any(record["kind"] == "train" for record in start)]
    return (trained or starts or [[]])[-1]


def sample_text(config: PretrainConfig, model_folder: Path, say: Callable[[str], None]) -> str | None:
    """Text drawn from the model: `train.sample_tokens` after `train.sample_prompt`, seeded."""
    if not config.train.sample_tokens:
        return None
    import torch
    from transformers import AutoTokenizer

    from finhpc.models.loading import load_model

    say("sampling text from the model")
    model: Any = load_model(model_folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    prompt = config.train.sample_prompt or tokenizer.eos_token
    ids = tokenizer(prompt, return_tensors="pt").input_ids
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


def summary(plan: Plan, result: dict[str, Any]) -> list[tuple[str, str]]:
    """The table at the end of a run."""
    rows = [
        ("parameters", f"{_millions(plan.params_total)}, dense {_millions(plan.params_dense)}"),
        ("compression", f"{plan.compression_ratio:.2f} x"),
        ("steps, tokens", f"{result['steps']:,}, {result['tokens']:,}"),
        ("train loss", _number(result["train_loss"], "{:.4f}")),
        ("validation loss", _number(result["val_loss"], "{:.4f}") + _below(result)),
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
    rows.append(("compare runs", _page(plan.config)))
    return rows


def dry_summary(plan: Plan) -> list[tuple[str, str]]:
    """The table of a dry run, but for what `finhpc.orchestration.estimate` tells."""
    return [
        ("parameters", f"{_millions(plan.params_total)}, dense {_millions(plan.params_dense)}"),
        ("compression", f"{plan.compression_ratio:.2f} x"),
        ("workers", str(plan.config.parallel.workers)),
        ("samples a step", str(plan.config.parallel.samples_per_step)),
    ]


def _page(config: PretrainConfig) -> str:
    """How to see the run beside others; the command as it was called here, so that it can be copied."""
    if config.run.tracking_uri and config.run.tracking_uri.startswith("http"):
        return f"open {redact(config.run.tracking_uri)}"
    command = sys.argv[0] if Path(sys.argv[0]).name == "finhpc" else "finhpc"
    where = f"--run.tracking_uri {config.run.tracking_uri}" if config.run.tracking_uri else ""
    return f"{command} ui {where or f'--run.storage {config.run.storage}'}"


def _below(result: dict[str, Any]) -> str:
    entropy, loss = result["val_unigram_entropy"], result["val_loss"]
    if loss is None:
        return ""
    where = "below" if loss <= entropy else "above"
    return f" ({abs(entropy - loss):.2f} nat {where} the unigram entropy of the same split, {entropy:.4f})"


def _memory(result: dict[str, Any]) -> str:
    peaks, resident = result["peak_memory_bytes"], result["peak_resident_bytes"]
    if not peaks:
        return "not measured"
    tensors = ", ".join(_number(peak and peak / 1e6, "{:,.0f} MB") for peak in peaks)
    return f"tensors {tensors}; resident {', '.join(f'{r / 1e6:,.0f} MB' for r in resident)}"


def _millions(count: int) -> str:
    return f"{count / 1e6:,.2f} M"


def _number(value: float | None, form: str) -> str:
    return "not measured" if value is None else form.format(value)
