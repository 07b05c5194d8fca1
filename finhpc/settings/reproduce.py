"""Settings of `finhpc reproduce`, and of the two steps that no other verb does: holding out and measuring."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from finhpc.settings.base import Section
from finhpc.settings.training import Resources, Run


class ReproduceConfig(Section):
    """Settings of `finhpc reproduce`: what the scale's recipe asks for, and where it runs."""

    scale: str = Field(
        "cpu", description="cpu: small models, two cores; paper: the paper's, a GPU cluster; or a YAML file of steps"
    )
    text: list[str] = Field(
        default_factory=list,
        description="text for pretraining, as prepare's source; default: the scale's (docs; OpenWebText)",
    )
    general: str | None = Field(
        None, description="folder with files of BoolQ, PIQA and WinoGrande; default: their steps are left out"
    )
    finance: list[str] = Field(
        default_factory=list, description="files of PhraseBank, FiQA, TFNS (FILE:FORMAT) that finetuning learns from"
    )
    instructions: list[str] = Field(
        default_factory=list, description="further examples that finetuning learns from; default: the scale's"
    )
    base: str | None = Field(None, description="base of finetuning; default: the scale's (the dense model, or Llama 2)")
    base_large: str | None = Field(None, description="second, larger base; default: the scale's, if it has one")
    examples: int | None = Field(None, ge=1, description="examples a finetuning learns from; default: the scale's")
    run: Run = Field(default_factory=lambda: Run(name="reproduce", experiment="reproduce"))
    resources: Resources = Field(
        default_factory=Resources,
        description="what is given here holds for every step, over the scale's own",
        json_schema_extra={"default": "the scale's"},
    )


class Step(Section):
    """One step of a reproduction. A setting `${NAME}` or `${NAME.KEY}` is an input, or an earlier step's result."""

    name: str = Field(pattern=r"[a-z0-9][a-z0-9-]*", description="its runs and folders are called STUDY-NAME")
    verb: str
    settings: dict[str, Any] = Field(default_factory=dict)


class Recipe(Section):
    """The steps of one scale."""

    about: str = Field("", description="what it takes, said before it starts")
    device: str | None = Field(None, description="that times are planned for, as estimate.device; null: this machine")
    shapes: dict[str, str] = Field(
        default_factory=dict, description="hub id -> preset of its shape, for checks before it is there"
    )
    inputs: dict[str, Any] = Field(default_factory=dict, description="what the inputs are where no flag says it")
    defaults: dict[str, dict[str, Any]] = Field(default_factory=dict, description="verb -> settings of all its steps")
    steps: list[Step] = Field(min_length=1)


class HoldOutConfig(Section):
    """Settings of the step `hold_out`: the examples that a finetuning of the same files holds out, as task files."""

    source: list[str] = Field(min_length=1, description="files of financial tasks, as finetune's data.source")
    eval_fraction: float = Field(0.1, gt=0, lt=1, description="as finetune's data.eval_fraction")
    encoding: str | None = Field(None, description="as finetune's data.encoding")
    out: str = Field("", description="folder for a file a task")


class MeasureConfig(Section):
    """Settings of the step `measure`: sizes, and the speed of generation, of models."""

    model: list[str] = Field(min_length=1, description="model or adapter folders")
    mlflow_run_id: str | None = Field(None, description="MLflow run that takes the figures; default: the model's own")
    bits: list[Literal[16, 8, 4]] = Field(
        default_factory=list, description="widths measured beside the one that the model was trained at"
    )
    prompt: int = Field(100, ge=1, description="tokens before those generated")
    new: int = Field(100, ge=2, description="tokens generated, greedily, with a cache")
    rounds: int = Field(3, ge=1, description="times every model is opened and measured, in turn; figures are medians")
    run: Run = Field(default_factory=Run)
    resources: Resources = Field(default_factory=Resources)
