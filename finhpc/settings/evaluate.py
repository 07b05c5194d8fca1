"""Settings of `finhpc evaluate`: which models, which tasks, from which files."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from finhpc.settings.base import LocalPath, Plugins, Section, plugins_field
from finhpc.settings.export import ExportQuantization
from finhpc.settings.finetune import LABELS, Labels
from finhpc.settings.training import Resources, Run


class EvaluateData(Section):
    """Where the tasks' examples lie."""

    folder: str | None = Field(
        None,
        description="of the tasks' files, found by their usual names in it or one below; default: data.files alone",
    )
    files: dict[str, str] = Field(default_factory=dict, description="a task's own file or hf:NAME: data.files.fpb FILE")
    labels: Labels = Field(default_factory=dict, description=LABELS)
    template: str | None = Field(None, description="of a task of your own; default: as finetune's")
    templates: str | None = Field(None, description="YAML file of your own templates; default: none")
    columns: dict[str, str] = Field(default_factory=dict, description="of a task of your own, as finetune's")
    encoding: str | None = Field(None, description="of text files; default: UTF-8, PhraseBank's latin-1")
    hf_split: str = Field("validation", description="split of an hf: source")
    shards: LocalPath | None = Field(
        None, description="folder written by `finhpc prepare`; required for the task perplexity"
    )
    split: Literal["train", "val"] = Field("val", description="split of the shards")
    seq_len: int | None = Field(None, ge=2, description="tokens a sample of the shards; default: their block_len")


class EvaluateConfig(Section):
    """Settings of `finhpc evaluate`."""

    model: list[str] = Field(
        default_factory=list, description="model folder, hub id, or adapter folder (repeat for several)"
    )
    adapter: list[str] = Field(
        default_factory=list, description="peft adapters: several for one model, or one a model (none: without)"
    )
    tasks: list[str] = Field(
        default_factory=lambda: ["fpb", "fiqa_sa", "tfns", "ner"],
        description="of boolq piqa winogrande fpb fiqa_sa tfns ner perplexity, lm-eval task files (.yaml), or a name "
        "of your own with data.files.NAME FILE: labels",
    )
    data: EvaluateData = Field(default_factory=EvaluateData)
    limit: int | None = Field(
        None, ge=1, description="examples per task (samples, for perplexity), drawn by seed; default: all"
    )
    seed: int = Field(0, ge=0, description="of the examples drawn, and of the bootstrap")
    batch_size: int = Field(16, ge=1, description="prompts computed together")
    bootstrap: int = Field(1000, ge=0, description="resamples for the 95 % intervals; 0: none")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="auto: as in the model")
    quantization: ExportQuantization = Field(default_factory=ExportQuantization)
    trust_task_code: bool = Field(False, description="let task files run the code they name (!function, class)")
    workers: int = Field(0, ge=0, description="models and tasks scored at a time; 0: as the cluster has room for")
    run: Run = Field(default_factory=lambda: Run(name="evaluate"))
    resources: Resources = Field(default_factory=Resources)
    plugins: Plugins = plugins_field()
