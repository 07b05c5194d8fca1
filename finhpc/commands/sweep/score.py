"""A trained model at fewer bits: quantized per vector, its size on disk, its loss on the same held-out samples."""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from finhpc.commands.export import export, scored_format
from finhpc.data.shards.shards import Shards
from finhpc.errors import ImplausibleError
from finhpc.evaluation import plausible
from finhpc.evaluation.sample_losses import held_out_losses
from finhpc.settings.base import build
from finhpc.settings.export import ExportConfig
from finhpc.settings.pretrain import PretrainConfig

FOLDER = "quantized-{bits}bit"  # in the run folder


def score_at(bits: int, config: PretrainConfig, run: Path, full: float | None = None) -> dict[str, Any]:
    """Write the run's model at `bits` into RUN/quantized-BITSbit and score it; an earlier score is returned as it is.

    Returns `val_loss`, `val_perplexity`, `model`, `size_bytes` (of its weights on disk) and `score_s`. The samples
    and the precision are those of the run's own evaluations. `full`: the run's loss at 16 bits. Raises
    `ImplausibleError` if no sound model can have that loss, and removes the folder.
    """
    out = run / FOLDER.format(bits=bits)
    known = out / "scores.json"
    if known.is_file():
        earlier: dict[str, Any] = json.loads(known.read_text(encoding="utf-8"))
        return earlier
    begin = time.perf_counter()
    if not (out / "config.json").is_file():
        settings = {"bits": bits, "scheme": config.quantization.scheme}
        source = run / "model"
        tree = {"model": str(source), "format": scored_format(source), "out": str(out), "dtype": "bfloat16"}
        export(build(ExportConfig, tree | {"quantization": settings}))
    loss = held_out_loss(out, config)
    figures = {
        "val_loss": loss,
        "val_perplexity": math.exp(min(loss, 700.0)),
        "model": str(out),
        "size_bytes": sum(file.stat().st_size for file in out.glob("*.safetensors")),
        "score_s": time.perf_counter() - begin,
    }
    vocab_size = Shards.open(str(config.data.shards)).manifest.vocab_size
    try:
        plausible.check(
            f"{run.name} at {bits} bits",
            figures,
            plausible.at_fewer_bits(bits, vocab_size, full),
            "if other runs quantize well, remove this one's model folder and run the same command again",
        )
    except ImplausibleError:
        shutil.rmtree(out)  # the next start exports the model again
        raise
    known.write_text(json.dumps(figures), encoding="utf-8")
    return figures


def held_out_loss(model_folder: Path, config: PretrainConfig) -> float:
    """Mean loss in nats of a model folder on the samples that the run is evaluated on.

    Uses this process's GPU if it has one and the run may use it, else the CPU.
    """
    torch.set_num_threads(config.resources.threads)
    device = torch.device("cuda" if config.resources.device != "cpu" and torch.cuda.is_available() else "cpu")
    return float(held_out_losses(model_folder, config, config.data.eval_samples, device).mean())
