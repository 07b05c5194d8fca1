"""Low-rank, quantised language models: pretrain, compress, finetune and compare.

The rooms, from the top down (imports point down only):

- `cli`            the `finhpc` command: one verb per job
- `reporting`      the paper's tables and figures from what MLflow holds: no Ray, no torch
- `orchestration`  Ray Train runs, MLflow tracking, what is on the screen
- `training`       engine, loop, checkpoint, metrics: torch and DeepSpeed, no Ray
- `planning`       memory, time and topologies before a run: counted from the code, beside the paper's tables
- `evaluation`     scores on general and financial tasks, by lm-eval; text generated with a cache: no Ray
- `data`           text on disk -> token shards (`prepare`) -> ordered streams (Ray Data)
- `models`         Hugging Face models cut into pipeline layers; presets; load, save, export
- `quantization`   weights in 8 and 4 bits: per vector, int8, NF4; training with rounded weights
- `lowrank`        y = B(A x): the layers, their initialisation, best factors, where they go in a model
- `config`, `errors`
- `registration`   what transformers knows of finhpc after `import finhpc`
- `noise`          lines of libraries' logs that say nothing to a user

`import finhpc` is light: torch, Ray and the rest are imported by what needs them.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

from finhpc.noise import drop
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
    "decompose": "finhpc.orchestration.decompose",
    "prepare": "finhpc.data.prepare",
    "pretrain": "finhpc.orchestration.pretrain",
    "finetune": "finhpc.orchestration.finetune",
    "estimate": "finhpc.orchestration.estimates",
    "study": "finhpc.orchestration.study",
    "sweep": "finhpc.orchestration.sweep",
    "reproduce": "finhpc.orchestration.reproduce",
    "evaluate": "finhpc.orchestration.evaluate",
    "generate": "finhpc.evaluation.generate",
    "export": "finhpc.models.export",
    "report": "finhpc.reporting.report",
    "ui": "finhpc.orchestration.ui",
    "PretrainConfig": "finhpc.config",
    "FinetuneConfig": "finhpc.config",
    "EstimateConfig": "finhpc.config",
    "FinetuneEstimateConfig": "finhpc.config",
    "StudyConfig": "finhpc.config",
    "SweepConfig": "finhpc.config",
    "FinetuneSweepConfig": "finhpc.config",
    "PrepareConfig": "finhpc.config",
    "EvaluateConfig": "finhpc.config",
    "GenerateConfig": "finhpc.config",
    "ExportConfig": "finhpc.config",
    "DecomposeConfig": "finhpc.config",
    "ReportConfig": "finhpc.config",
    "ReproduceConfig": "finhpc.config",
    "UiConfig": "finhpc.config",
    "FinhpcError": "finhpc.errors",
    "ConfigError": "finhpc.errors",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'finhpc' has no attribute {name!r}; public names: {__all__}")


drop()
register()
