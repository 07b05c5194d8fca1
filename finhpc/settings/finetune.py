"""Settings of a finetuning run: LoRA beside a frozen, perhaps quantised, base."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from finhpc.settings.base import MAY_CHANGE, LocalPath, ModelPath, Plugins, Section, Source, plugins_field
from finhpc.settings.pretrain import PretrainConfig
from finhpc.settings.training import Optimizer, Parallel, Resources, Run, Train

LABELS = (
    "the labels (hawkish dovish neutral), or the label of each code (0=dovish 1=hawkish); default: those of the "
    "template, or of the data"
)


def _meaning(value: Any) -> Any:
    """A list of labels, or of CODE=LABEL, as a mapping from what stands in the data to the label."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list):
        words = [_word(item) for item in value]
        value = dict(((code.strip(), label) if equals else (code, code)) for code, equals, label in map(_parted, words))
        if len(value) < len(words):
            raise ValueError("a label or code is given twice; give each once")
    if not isinstance(value, dict):
        return value
    found = {_word(code): _word(label) for code, label in value.items()}
    if found and len({label.lower() for label in found.values()}) < 2:
        raise ValueError("at least two different labels are needed")
    return found


def _parted(word: str) -> tuple[str, str, str]:
    return word.partition("=")


def _word(value: Any) -> str:
    if isinstance(value, bool):
        raise ValueError("YAML reads yes, no, true and false as booleans; put labels in quotation marks")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int) or not str(value).strip():
        raise ValueError(f"{value!r} is not a label; write a word or a whole number")
    return " ".join(str(value).split())


Labels = Annotated[dict[str, str], BeforeValidator(_meaning)]


class Base(Section):
    """The model that stays as it is."""

    path: ModelPath | None = Field(
        None,
        description="base: a Hugging Face folder, a hub id, a .gguf file, or a model of finhpc; required",
        json_schema_extra=MAY_CHANGE,
    )


class Lora(Section):
    """The adapter, in peft's terms (E. Hu et al., "LoRA", 2021)."""

    rank: int = Field(8, description="rank of A and B")
    lora_alpha: float = Field(16.0, gt=0, description="the adapter's output is scaled by lora_alpha / rank")
    targets: list[str] = Field(
        default_factory=lambda: ["all-linear"],
        description="names of the adapted layers, as ends of module names (q_proj), or a regular expression for whole "
        "names, as peft takes a string (.*[02468].*q_proj); all-linear: all but the head",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="on the adapter's input")
    init: Literal["default", "gaussian", "orthogonal", "pissa", "olora"] = Field(
        "default", description="peft's init_lora_weights; default: A uniform (Kaiming), B zero"
    )

    @field_validator("targets", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class FinetuneQuantization(Section):
    """How the frozen base is stored."""

    bits: Literal[16, 8, 4] = Field(16, description="bits a weight of the base's linear layers; 16: not quantised")
    scheme: Literal["auto", "int8", "nf4", "minmax"] = Field(
        "auto", description="auto: bitsandbytes' int8 at 8 bits, its NF4 at 4; minmax: the paper's, per vector"
    )


class Instructions(Section):
    """Examples to learn from: a prompt, and the answer that alone carries loss."""

    source: list[Source] = Field(
        default_factory=list,
        description="files of examples, or hf:NAME (repeat for several; FILE:FORMAT names its format)",
        json_schema_extra=MAY_CHANGE,
    )
    template: str | None = Field(None, description="named prompt template; default: the one of each file's format")
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="columns that hold the template's fields, if they have other names: input=headline, label=mood",
    )
    templates: LocalPath | None = Field(
        None, description="YAML file of your own templates; default: none (--list_templates shows all)"
    )
    labels: Labels = Field(default_factory=dict, description=LABELS)
    encoding: str | None = Field(
        None, description="of text and CSV files; default: UTF-8, and PhraseBank latin-1 unless it is valid UTF-8"
    )
    hf_split: str = Field("train", description="split of hf: sources")
    eval_source: list[Source] = Field(
        default_factory=list,
        description="held-out files; default: eval_fraction of each source, split by sentence",
        json_schema_extra=MAY_CHANGE,
    )
    eval_fraction: float = Field(0.1, ge=0, lt=1, description="share of distinct inputs held out where none are given")
    limit: int | None = Field(None, ge=1, description="examples trained on, drawn by the seed; default: all")
    eval_limit: int | None = Field(None, ge=1, description="held-out examples scored at each evaluation; default: all")
    max_len: int = Field(512, ge=8, description="tokens an example; longer inputs are cut, see cut")
    cut: Literal["input", "refuse"] = Field("input", description="input: the end of the input is cut, never the answer")
    max_dropped: float = Field(
        0.01, ge=0, le=1, description="largest share of examples dropped since max_len leaves no room for their answer"
    )


class FinetuneTrain(Train):
    """As in pretraining, counted in passes over the examples."""

    steps: int = Field(
        300,
        ge=1,
        description="optimizer steps; in place of train.epochs",
        json_schema_extra={"default": "by train.epochs"},
    )
    epochs: float | None = Field(
        1.0,
        gt=0,
        description="passes over the examples; not used if train.steps is given",
        json_schema_extra=MAY_CHANGE,
    )


class FinetuneConfig(Section):
    """Settings of `finhpc finetune`."""

    model: Base = Field(default_factory=Base)
    lora: Lora = Field(default_factory=Lora)
    data: Instructions = Field(default_factory=Instructions)
    optimizer: Optimizer = Field(default_factory=lambda: Optimizer(lr=1e-3, weight_decay=0.0))
    parallel: Parallel = Field(default_factory=lambda: Parallel(micro_batch_size=16))
    train: FinetuneTrain = Field(default_factory=FinetuneTrain)
    quantization: FinetuneQuantization = Field(default_factory=FinetuneQuantization)
    run: Run = Field(default_factory=lambda: Run(name="finetune"))
    resources: Resources = Field(default_factory=Resources)
    plugins: Plugins = plugins_field()


TrainingConfig = PretrainConfig | FinetuneConfig
