"""Settings of `finhpc reproduce`, and of its two steps that are not commands: holding out and measuring."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from finhpc.settings.base import Section
from finhpc.settings.training import Resources, Run


class ReproduceConfig(Section):
    """Settings of `finhpc reproduce`: the inputs of the recipe, and where it runs."""

    scale: str = Field(
        "cpu", description="cpu: small models on two cores; paper: its models on a GPU cluster; or a YAML file of steps"
    )
    text: list[str] = Field(
        default_factory=list,
        description="text for pretraining, as source of prepare; default: that of the scale (docs; OpenWebText)",
    )
    general: str | None = Field(
        None, description="folder with files of BoolQ, PIQA and WinoGrande; default: skip their steps"
    )
    finance: list[str] = Field(
        default_factory=list, description="files of PhraseBank, FiQA and TFNS (FILE:FORMAT) for finetuning"
    )
    instructions: list[str] = Field(
        default_factory=list, description="further examples for finetuning; default: those of the scale"
    )
    base: str | None = Field(
        None, description="base model of finetuning; default: that of the scale (the dense model, or Llama 2)"
    )
    base_large: str | None = Field(
        None, description="second, larger base model; default: that of the scale, if it has one"
    )
    examples: int | None = Field(None, ge=1, description="examples per finetuning; default: that of the scale")
    run: Run = Field(default_factory=lambda: Run(name="reproduce", experiment="reproduce"))
    resources: Resources = Field(
        default_factory=Resources,
        description="resources of every step; overrides the scale",
        json_schema_extra={"default": "as in the scale"},
    )


class Step(Section):
    """One step. A setting `${NAME}` or `${NAME.KEY}` is an input, or a result of an earlier step."""

    name: str = Field(pattern=r"[a-z0-9][a-z0-9-]*", description="its run and folder are called STUDY-NAME")
    verb: str
    settings: dict[str, Any] = Field(default_factory=dict)


class Recipe(Section):
    """The steps of one scale."""

    about: str = Field("", description="time and space that it takes, shown before it starts")
    device: str | None = Field(None, description="device for estimated times, as estimate.device; null: this machine")
    shapes: dict[str, str] = Field(
        default_factory=dict, description="hub id -> preset of its shape, for checks before the download"
    )
    inputs: dict[str, Any] = Field(default_factory=dict, description="inputs that no flag sets")
    defaults: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="command -> settings of all its steps"
    )
    steps: list[Step] = Field(min_length=1)


class HoldOutConfig(Section):
    """Settings of the step `hold_out`, which writes the held-out examples of a finetuning as task files."""

    source: list[str] = Field(min_length=1, description="files of financial tasks, as data.source of finetune")
    eval_fraction: float = Field(0.1, gt=0, lt=1, description="as data.eval_fraction of finetune")
    encoding: str | None = Field(None, description="as data.encoding of finetune; default: see there")
    out: str = Field("", description="folder for one file per task")


class MeasureConfig(Section):
    """Settings of the step `measure`: the sizes of models and their speed of generation."""

    model: list[str] = Field(min_length=1, description="model or adapter folders")
    mlflow_run_id: str | None = Field(None, description="MLflow run for the results; default: the run of the model")
    bits: list[Literal[16, 8, 4]] = Field(default_factory=list, description="further bits per weight to measure")
    prompt: int = Field(100, ge=1, description="tokens of the prompt")
    new: int = Field(100, ge=2, description="tokens to generate greedily with a cache")
    rounds: int = Field(3, ge=1, description="rounds in which each model is opened and measured; results are medians")
    run: Run = Field(default_factory=Run)
    resources: Resources = Field(default_factory=Resources)
