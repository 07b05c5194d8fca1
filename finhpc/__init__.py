"""Low-rank, quantized language models: pretrain, compress, finetune, evaluate and compare them.

The packages from the top down; an import points down, never up or in a circle:

- `cli`             the `finhpc` command line
- `bench`           finhpc compared with plain code for the same work
- `commands`        one file or folder per command, and the table of commands
- `runs`            one training run: folder, workers, progress, result
- `serving`         a model behind OpenAI's API: requests, adapters, metrics, Ray Serve
- `tracking`        MLflow, mirrored from the run's journal
- `planning`        a run's checks, model config and first weights; its memory and time, counted from the code
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
from typing import TYPE_CHECKING, Any

from finhpc.commands import COMMANDS, Command, import_named
from finhpc.log import set_up
from finhpc.registration import register

if TYPE_CHECKING:  # what editors and mypy see; at run time each name is imported when it is used
    from finhpc.errors import ConfigError as ConfigError
    from finhpc.errors import FinhpcError as FinhpcError
    from finhpc.models.loading import load_model as load_model
    from finhpc.settings.decompose import DecomposeConfig as DecomposeConfig
    from finhpc.settings.estimate import EstimateConfig as EstimateConfig
    from finhpc.settings.estimate import FinetuneEstimateConfig as FinetuneEstimateConfig
    from finhpc.settings.evaluate import EvaluateConfig as EvaluateConfig
    from finhpc.settings.export import ExportConfig as ExportConfig
    from finhpc.settings.finetune import FinetuneConfig as FinetuneConfig
    from finhpc.settings.generate import GenerateConfig as GenerateConfig
    from finhpc.settings.prepare import PrepareConfig as PrepareConfig
    from finhpc.settings.pretrain import PretrainConfig as PretrainConfig
    from finhpc.settings.report import ReportConfig as ReportConfig
    from finhpc.settings.report import UiConfig as UiConfig
    from finhpc.settings.reproduce import ReproduceConfig as ReproduceConfig
    from finhpc.settings.serve import ServeConfig as ServeConfig
    from finhpc.settings.sweep import FinetuneSweepConfig as FinetuneSweepConfig
    from finhpc.settings.sweep import StudyConfig as StudyConfig
    from finhpc.settings.sweep import SweepConfig as SweepConfig

    prepare: Command[PrepareConfig]
    pretrain: Command[PretrainConfig]
    estimate: Command[EstimateConfig | FinetuneEstimateConfig]
    sweep: Command[SweepConfig | FinetuneSweepConfig]
    study: Command[StudyConfig]
    decompose: Command[DecomposeConfig]
    finetune: Command[FinetuneConfig]
    export: Command[ExportConfig]
    evaluate: Command[EvaluateConfig]
    generate: Command[GenerateConfig]
    serve: Command[ServeConfig]
    report: Command[ReportConfig]
    reproduce: Command[ReproduceConfig]
    ui: Command[UiConfig]

__version__ = "0.1.0"

# No usage report leaves the machine unless the user turned it on before importing finhpc.
TELEMETRY_OFF = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
}
# Opening a pickled model runs any code that its author put in. Our models are safetensors and do not need this, so it
# is off unless the user allowed it before importing finhpc.
PICKLE_OFF = {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
for _name, _value in {**TELEMETRY_OFF, **PICKLE_OFF}.items():
    os.environ.setdefault(_name, _value)

_OTHERS = {
    "load_model": "finhpc.models.loading:load_model",
    "ConfigError": "finhpc.errors:ConfigError",
    "FinhpcError": "finhpc.errors:FinhpcError",
}
_CLASSES = [row.settings for row in COMMANDS.values() if row.settings.startswith("finhpc.settings.")]
_NAMED = _OTHERS | {path.partition(":")[2]: path for path in _CLASSES}
__all__ = ["__version__", *(name for name in COMMANDS if " " not in name), *_NAMED]


def __getattr__(name: str) -> Any:
    if name in COMMANDS:
        return COMMANDS[name]
    if name in _NAMED:
        return import_named(_NAMED[name])
    raise AttributeError(f"module 'finhpc' has no attribute {name!r}; public names: {', '.join(__all__)}")


set_up()
register()
