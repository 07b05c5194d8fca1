"""Settings of `finhpc evaluate`: which models, which tasks, from which files."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from finhpc.settings.base import LocalPath, Plugins, Section, plugins_field
from finhpc.settings.export import ExportQuantization
from finhpc.settings.finetune import LABELS, Labels
from finhpc.settings.training import Resources, Run


class EvaluateData(Section):
    """The examples of the tasks."""

    folder: str | None = Field(
        None, description="folder of task files under their usual names, also one level below; default: only data.files"
    )
    files: dict[str, str] = Field(default_factory=dict, description="file or hf:NAME of a task: data.files.fpb FILE")
    labels: Labels = Field(default_factory=dict, description=LABELS)
    template: str | None = Field(None, description="prompt template of a task of your own; default: as in finetune")
    templates: str | None = Field(None, description="YAML file with templates of your own; default: none")
    columns: dict[str, str] = Field(default_factory=dict, description="columns of a task of your own, as in finetune")
    encoding: str | None = Field(None, description="encoding of text files; default: UTF-8; PhraseBank: latin-1")
    hf_split: str = Field("validation", description="split of a source hf:NAME")
    shards: LocalPath | None = Field(
        None, description="folder written by `finhpc prepare`; required for the task perplexity"
    )
    split: Literal["train", "val"] = Field("val", description="split of the shards")
    seq_len: int | None = Field(None, ge=2, description="tokens per sample of the shards; default: their block_len")


class EvaluateConfig(Section):
    """Settings of `finhpc evaluate`."""

    model: list[str] = Field(
        default_factory=list, description="model folder, hub id or adapter folder (repeatable); required"
    )
    adapter: list[str] = Field(
        default_factory=list, description="peft adapters: several for one model, or one per model (none: no adapter)"
    )
    tasks: list[str] = Field(
        default_factory=lambda: ["fpb", "fiqa_sa", "tfns", "ner"],
        description="boolq piqa winogrande fpb fiqa_sa tfns ner perplexity, task files of lm-eval (.yaml), or a name "
        "of your own with data.files.NAME FILE",
    )
    data: EvaluateData = Field(default_factory=EvaluateData)
    limit: int | None = Field(
        None, ge=1, description="examples per task (samples for perplexity), drawn by the seed; default: all"
    )
    seed: int = Field(0, ge=0, description="seed of the drawn examples and of the bootstrap")
    batch_size: int = Field(16, ge=1, description="prompts per batch")
    bootstrap: int = Field(1000, ge=0, description="bootstrap resamples for the 95 % intervals; 0: none")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="type of the weights; auto: as in the model"
    )
    quantization: ExportQuantization = Field(default_factory=ExportQuantization)
    trust_task_code: bool = Field(False, description="let task files run the code that they name (!function, class)")
    workers: int = Field(0, ge=0, description="model-task pairs scored at the same time; 0: as many as fit the cluster")
    run: Run = Field(default_factory=lambda: Run(name="evaluate"))
    resources: Resources = Field(default_factory=Resources)
    plugins: Plugins = plugins_field()
