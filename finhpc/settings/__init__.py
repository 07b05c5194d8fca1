"""Every setting of a run: typed, validated together, YAML in and out.

`load(cls, source, overrides)` resolves defaults < recipe or YAML < flags and raises one
`ConfigError` that lists every problem.
"""

from finhpc.settings.base import Section, build, defaults, flatten, keys, load, nearest, recipes, to_yaml
from finhpc.settings.evaluate import EvaluateConfig, EvaluateData
from finhpc.settings.finetune import FinetuneConfig, FinetuneEstimateConfig, FinetuneQuantization, Instructions, Lora
from finhpc.settings.folders import Calibration, DecomposeConfig, ExportConfig, PrepareConfig, UiConfig
from finhpc.settings.generate import GenerateConfig, Sampling
from finhpc.settings.pretrain import (
    LINEAR_KINDS,
    Data,
    EstimateConfig,
    Hardware,
    Method,
    Model,
    PretrainConfig,
    StudyConfig,
    Variant,
)
from finhpc.settings.report import ReportConfig
from finhpc.settings.reproduce import HoldOutConfig, MeasureConfig, Recipe, ReproduceConfig, Step
from finhpc.settings.sweep import FinetuneSweepConfig, Sweep, SweepConfig
from finhpc.settings.training import Optimizer, Parallel, Recompute, Resources, Run, Train

TrainingConfig = PretrainConfig | FinetuneConfig

__all__ = [
    "LINEAR_KINDS",
    "Calibration",
    "Data",
    "DecomposeConfig",
    "EstimateConfig",
    "EvaluateConfig",
    "EvaluateData",
    "ExportConfig",
    "FinetuneConfig",
    "FinetuneEstimateConfig",
    "FinetuneQuantization",
    "FinetuneSweepConfig",
    "GenerateConfig",
    "Hardware",
    "HoldOutConfig",
    "Instructions",
    "Lora",
    "MeasureConfig",
    "Method",
    "Model",
    "Optimizer",
    "Parallel",
    "PrepareConfig",
    "PretrainConfig",
    "Recipe",
    "Recompute",
    "ReportConfig",
    "ReproduceConfig",
    "Resources",
    "Run",
    "Sampling",
    "Section",
    "Step",
    "StudyConfig",
    "Sweep",
    "SweepConfig",
    "Train",
    "TrainingConfig",
    "UiConfig",
    "Variant",
    "build",
    "defaults",
    "flatten",
    "keys",
    "load",
    "nearest",
    "recipes",
    "to_yaml",
]
