"""Low-rank, quantized language models: pretrain, compress, finetune, evaluate and compare them.

The packages from the top down; an import points down, never up or in a circle:

- `cli`             the `finhpc` command: a table of commands
- `bench`           finhpc measured against the plain way of doing the same
- `commands`        one file or folder per command
- `runs`            one training run: folder, workers, progress, result
- `tracking`        MLflow, mirrored from the run's journal
- `planning`        what a run needs in memory and time, counted from the code
- `training`        engine, trainer, checkpoints, journal: torch and DeepSpeed, no Ray
- `evaluation`      scores on general and financial tasks
- `generation`      text from a model with cached keys and values, and adapters
- `data`            text to shards, shards to streams, records to packed examples
- `models`          Hugging Face models: families, pipeline layers, LoRA, files
- `cluster`         Ray: connection, placement, network
- `lowrank`         y = B(A x): the layers, where they go, how they are initialized, factorization
- `quantization`    weights in 8 and 4 bits: per vector, int8, NF4
- `settings`        what a user can set, checked as a whole
- `files`, `screen`, `log`, `errors` and other small files that everything uses

`import finhpc` is light: torch, Ray and the rest are imported by what needs them.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

from finhpc.log import set_up
from finhpc.registration import register

__version__ = "0.1.0"

# No usage report leaves the machine unless the user turned it on before importing finhpc.
TELEMETRY_OFF = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
}
# A pickled model runs whatever code its author put in when it is opened. Ours are safetensors, so no
# model needs that, unless the user allowed it before importing finhpc.
PICKLE_OFF = {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
for _name, _value in {**TELEMETRY_OFF, **PICKLE_OFF}.items():
    os.environ.setdefault(_name, _value)

_PUBLIC = {
    "load_model": "finhpc.models.loading",
    "bench": "finhpc.bench",
    "decompose": "finhpc.commands.decompose.command",
    "prepare": "finhpc.commands.prepare",
    "pretrain": "finhpc.commands.pretrain",
    "finetune": "finhpc.commands.finetune",
    "estimate": "finhpc.commands.estimate.command",
    "study": "finhpc.commands.study.command",
    "sweep": "finhpc.commands.sweep.command",
    "reproduce": "finhpc.commands.reproduce.command",
    "evaluate": "finhpc.commands.evaluate.command",
    "generate": "finhpc.commands.generate",
    "export": "finhpc.commands.export",
    "report": "finhpc.commands.report.command",
    "ui": "finhpc.commands.ui",
    "PretrainConfig": "finhpc.settings.pretrain",
    "FinetuneConfig": "finhpc.settings.finetune",
    "EstimateConfig": "finhpc.settings.estimate",
    "FinetuneEstimateConfig": "finhpc.settings.estimate",
    "StudyConfig": "finhpc.settings.study",
    "SweepConfig": "finhpc.settings.sweep",
    "FinetuneSweepConfig": "finhpc.settings.sweep",
    "PrepareConfig": "finhpc.settings.prepare",
    "EvaluateConfig": "finhpc.settings.evaluate",
    "GenerateConfig": "finhpc.settings.generate",
    "ExportConfig": "finhpc.settings.export",
    "DecomposeConfig": "finhpc.settings.decompose",
    "ReportConfig": "finhpc.settings.report",
    "ReproduceConfig": "finhpc.settings.reproduce",
    "UiConfig": "finhpc.settings.report",
    "FinhpcError": "finhpc.errors",
    "ConfigError": "finhpc.errors",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'finhpc' has no attribute {name!r}; public names: {__all__}")


set_up()
register()
