"""Settings of `finhpc finetune`: a LoRA adapter over a frozen base, which may be quantized."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from finhpc.settings.base import MAY_CHANGE, LocalPath, ModelPath, Plugins, Section, Source, plugins_field
from finhpc.settings.training import Optimizer, Parallel, Resources, Run, Train

LABELS = (
    "labels (hawkish dovish neutral), or codes and their labels (0=dovish 1=hawkish); default: those of the "
    "template or of the data"
)


def _label_mapping(value: Any) -> Any:
    """Turn a list of labels, or of CODE=LABEL, into a mapping from the value in the data to the label."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list):
        pairs = [_word(item).partition("=") for item in value]
        value = {code.strip() if equals else code: label if equals else code for code, equals, label in pairs}
        if len(value) < len(pairs):
            raise ValueError("a label or code is given twice; give each once")
    if not isinstance(value, dict):
        return value
    labels = {_word(code): _word(label) for code, label in value.items()}
    if labels and len({label.lower() for label in labels.values()}) < 2:
        raise ValueError("at least two different labels are needed")
    return labels


def _word(value: Any) -> str:
    if isinstance(value, bool):
        raise ValueError("YAML reads yes, no, true and false as booleans; put labels in quotation marks")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int) or not str(value).strip():
        raise ValueError(f"{value!r} is not a label; write a word or an integer")
    return " ".join(str(value).split())


LOSSES = {  # the values of data.loss that read a setting
    "beta": ("preferences",),
    "label_smoothing": ("labels", "preferences"),
    "class_weights": ("labels",),
    "balanced": ("labels",),
}
Labels = Annotated[dict[str, str], BeforeValidator(_label_mapping)]


class Base(Section):
    """The frozen model."""

    path: ModelPath | None = Field(
        None,
        description="base model: a Hugging Face folder, a hub id, a .gguf file or a finhpc model; required",
        json_schema_extra=MAY_CHANGE,
    )


class Lora(Section):
    """The adapter, in the terms of peft (E. Hu et al., "LoRA", 2021)."""

    path: LocalPath | None = Field(
        None,
        description="folder of an adapter to continue from, in peft's format and of these settings; default: a new one",
        json_schema_extra=MAY_CHANGE,
    )
    rank: int = Field(8, description="rank of A and B")
    lora_alpha: float = Field(
        16.0, gt=0, description="scale: the output of the adapter is multiplied by lora_alpha / rank"
    )
    rslora: bool = Field(
        False,
        description="rsLoRA: multiply by lora_alpha / sqrt(rank) instead, so that high ranks learn as fast as low ones",
    )
    dora: bool = Field(
        False,
        description="DoRA: train the length of each row of W + B A apart from its direction; slower, dense layers only",
    )
    targets: list[str] = Field(
        default_factory=lambda: ["all-linear"],
        description="layers with an adapter: ends of module names (q_proj), or one regular expression for whole names "
        "(.*[02468].*q_proj), as in peft; all-linear: all except the head",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the input of the adapter")
    init: Literal["default", "gaussian", "orthogonal", "pissa", "olora", "loftq", "eva"] = Field(
        "default",
        description="init_lora_weights of peft; default: A uniform (Kaiming), B zero; pissa, olora: from the base's "
        "weights; loftq: from what quantizing the base lost; eva: from the inputs of the layers",
    )

    @field_validator("targets", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class FinetuneQuantization(Section):
    """How the frozen base is stored."""

    bits: Literal[16, 8, 4] = Field(16, description="bits per weight of the linear layers; 16: not quantized")
    scheme: str = Field(
        "auto", description="auto: bitsandbytes int8 for 8 bits, NF4 for 4; minmax: the scheme of the paper, per vector"
    )


class Instructions(Section):
    """Examples: a prompt and an answer, or two answers of which one is preferred. Only answers count for the loss."""

    loss: Literal["answers", "labels", "preferences"] = Field(
        "answers",
        description="answers: cross-entropy of the answers' tokens over the vocabulary; labels: of the answer among "
        "the labels of its source, as they are chosen for scores; preferences: DPO on pairs of answers",
    )
    beta: float = Field(
        0.1, gt=0, description="loss=preferences: DPO's beta; higher keeps the model closer to what it began as"
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="loss=labels: the share of the wanted distribution that all labels divide evenly; loss=preferences:"
        " of pairs that are taken to be the wrong way round",
    )
    class_weights: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default_factory=dict,
        description="loss=labels: factors of the losses of examples, by label: negative=2 neutral=0.5; default: 1",
    )
    balanced: bool = Field(
        False, description="loss=labels: rarer labels count more, so that all labels count as much in a pass"
    )

    source: list[Source] = Field(
        default_factory=list,
        description="files of examples, or hf:NAME (repeatable; FILE:FORMAT names the format)",
        json_schema_extra=MAY_CHANGE,
    )
    template: str | None = Field(None, description="name of the prompt template; default: that of each file's format")
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="columns of the template's fields, if they have other names: input=headline label=mood",
    )
    templates: LocalPath | None = Field(
        None, description="YAML file with templates of your own; default: none (--list_templates shows all)"
    )
    labels: Labels = Field(default_factory=dict, description=LABELS)
    encoding: str | None = Field(
        None, description="encoding of text and CSV files; default: UTF-8; PhraseBank: latin-1 unless it is valid UTF-8"
    )
    weights: dict[str, Annotated[float, Field(gt=0, le=1000)]] = Field(
        default_factory=dict,
        description="how often a pass takes each example of a source: fpb.txt=6 fiqa.csv=21 (0.5: half of them); "
        "default: once",
    )
    temperature: float = Field(
        1.0,
        ge=1,
        description="gives small sources more of a pass: size^(1/temperature); 1: as they are, 100: all about as much "
        "as the largest",
    )
    hf_split: str = Field("train", description="split of sources hf:NAME")
    eval_source: list[Source] = Field(
        default_factory=list,
        description="files of held-out examples; default: eval_fraction of each source, split by sentence",
        json_schema_extra=MAY_CHANGE,
    )
    eval_fraction: float = Field(
        0.1, ge=0, lt=1, description="share of distinct inputs to hold out if eval_source is not given"
    )
    limit: int | None = Field(None, ge=1, description="examples to train on, drawn by the seed; default: all")
    eval_limit: int | None = Field(
        None, ge=1, description="held-out examples to score at each evaluation; default: all"
    )
    max_len: int = Field(512, ge=8, description="tokens per example; longer ones are handled as `cut` says")
    cut: Literal["input", "refuse"] = Field(
        "input", description="input: truncate the end of the input, never the answer; refuse: stop with an error"
    )
    max_dropped: float = Field(
        0.01,
        ge=0,
        le=1,
        description="largest share of examples that may be dropped because their answer does not fit max_len",
    )


class FinetuneTrain(Train):
    """As in pretraining, but counted in passes over the examples."""

    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="type of the base and of all activations; adapters are float32 in any case"
    )
    steps: int = Field(
        300,
        ge=1,
        description="optimizer steps; replaces train.epochs",
        json_schema_extra={"default": "by train.epochs"},
    )
    epochs: float | None = Field(
        1.0, gt=0, description="passes over the examples; ignored if train.steps is given", json_schema_extra=MAY_CHANGE
    )
    best_by: Literal["val_loss", "val_weighted_f1"] | None = Field(
        None,
        description="metric of the evaluation that the model is taken from, whose checkpoint is kept: the held-out "
        "loss, or the weighted F1 of held-out labels; default: none, the model of the last step",
    )
    patience: int | None = Field(
        None,
        ge=1,
        description="evaluations without a better train.best_by after which the run ends; default: it takes all steps",
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

    def problems(self) -> list[str]:
        """Return every contradiction between settings, each with its remedy."""
        train, data = self.train, self.data
        problems = [
            f"data.{name}={str(getattr(data, name)).lower()} is for data.loss={' or '.join(losses)}, and data.loss is "
            f"{data.loss}; use data.loss={losses[0]}, or leave data.{name} out."
            for name, losses in LOSSES.items()
            if getattr(data, name) != Instructions.model_fields[name].get_default(call_default_factory=True)
            and data.loss not in losses
        ]
        if train.patience is not None and train.best_by is None:
            problems.append(
                f"train.patience={train.patience} waits for better evaluations, and train.best_by does not name their "
                "metric; use train.best_by=val_loss, or leave train.patience out."
            )
        if train.patience is not None and not train.eval_every:
            problems.append(
                f"train.patience={train.patience} counts evaluations, and train.eval_every=0 has only one, at the end; "
                "set train.eval_every."
            )
        if self.parallel.schedule == "dualpipev":
            problems.append(
                "parallel.schedule=dualpipev needs micro-batches of one shape, but packs of examples differ in length; "
                "use parallel.schedule=1f1b."
            )
            return problems
        return problems + self.parallel.problems()
