"""Every setting of a run: typed, validated together, YAML in and out.

`load(cls, source, overrides)` resolves defaults < recipe or YAML < flags and raises one
`ConfigError` that lists every problem.
"""

from __future__ import annotations

import difflib
import os
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from finhpc.errors import ConfigError

LINEAR_KINDS = ("attention", "mlp", "head", "embedding")
Recompute = Literal["none", "attention", "full"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True)


class Model(Section):
    """Which transformer. A preset names a shape; the other keys change parts of it. Or `path`, which brings its own."""

    path: str | None = Field(
        None, description="model folder whose weights training starts from, dense or low-rank; it brings its own shape"
    )
    preset: str = Field("gpt2-tiny", description="named shape; `finhpc pretrain --help` lists them")
    layers: int | None = Field(None, ge=1, description="transformer blocks")
    width: int | None = Field(None, ge=1, description="hidden size")
    heads: int | None = Field(None, ge=1, description="attention heads")
    kv_heads: int | None = Field(None, ge=1, description="key/value heads (Llama)")
    mlp_width: int | None = Field(None, ge=1, description="inner size of the feed-forward part")
    context: int | None = Field(None, ge=2, description="longest sequence the model can take")
    vocab_size: int | None = Field(None, ge=2, description="default: the shards' tokeniser's")
    dropout: float = Field(0.0, ge=0, lt=1)
    tie_embeddings: bool | None = Field(
        None, description="share embedding and head; default: as the preset; never with a low-rank head"
    )


class Method(Section):
    """How a linear layer is made."""

    kind: str = Field(
        "low_rank",
        description="dense; low_rank: y = B(A x) from scratch (method 1); svd: from the factors of model.path "
        "(method 2); blend: y = alpha W x + (1 - alpha) B A x, alpha falling to 0 (method 3); cola: y = B silu(A x)",
    )
    rank: int = Field(64, description="rank of every pair that `ranks` does not name")
    ranks: dict[str, int] = Field(
        default_factory=dict, description=f"rank for a kind of layer: any of {', '.join(LINEAR_KINDS)}"
    )
    init: Literal["spectral", "normal", "cola"] | None = Field(
        None,
        description="how A and B start; spectral: SVD of the dense initialisation, split as square roots; default: "
        "spectral, cola for kind cola",
    )
    embedding: Literal["dense", "low_rank"] = Field("dense", description="the token embedding")
    head: Literal["low_rank", "dense"] = Field("low_rank", description="the output layer")
    blend_start: float = Field(0.99, gt=0, le=1, description="alpha in the first step (blend)")
    blend_share: float = Field(0.5, gt=0, le=1, description="share of train.steps after which alpha is 0 (blend)")
    blend_schedule: Literal["linear", "cosine"] = Field("linear", description="how alpha falls (blend)")
    blend_weight: Literal["frozen", "trainable"] = Field(
        "frozen", description="whether W is trained too, as long as it is there (blend)"
    )


class Data(Section):
    shards: str | None = Field(None, description="folder written by `finhpc prepare`")
    seq_len: int = Field(256, ge=2, description="tokens a sample; must divide the shards' block length")
    eval_samples: int = Field(128, ge=1, description="held-out samples scored at each evaluation")


class Optimizer(Section):
    name: Literal["adamw", "adamw8bit"] = Field(
        "adamw", description="adamw8bit: bitsandbytes' AdamW, moments of matrices of 4,096 weights and more in 8 bits"
    )
    lr: float = Field(1e-3, gt=0, description="peak learning rate of AdamW")
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="final over peak learning rate (cosine)")
    warmup_steps: int = Field(20, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0, description="on matrices; never on biases and norms")
    decay: Literal["factors", "product"] = Field(
        "factors", description="what weight_decay shrinks in a low-rank layer: A and B, or their product B A"
    )
    lr_scale_a: float = Field(1.0, gt=0, description="learning rate of the factors A over that of the rest")
    lr_scale_b: float = Field(1.0, gt=0, description="learning rate of the factors B over that of the rest")
    grad_clip: float = Field(1.0, ge=0, description="largest gradient norm over the whole model; 0: no clipping")


class Parallel(Section):
    stages: int = Field(1, ge=1, description="pipeline stages")
    replicas: int = Field(1, ge=1, description="copies of the whole pipeline (data parallel)")
    micro_batch_size: int = Field(4, ge=1, description="samples a micro-batch")
    micro_batches: int = Field(1, ge=1, description="micro-batches a step and replica")
    global_batch_size: int | None = Field(
        None, ge=1, description="checked: micro_batch_size x micro_batches x replicas (derived when absent)"
    )

    @property
    def workers(self) -> int:
        return self.stages * self.replicas

    @property
    def samples_per_step(self) -> int:
        return self.micro_batch_size * self.micro_batches * self.replicas


class Train(Section):
    steps: int = Field(300, ge=1, description="optimiser steps")
    eval_every: int = Field(50, ge=0, description="steps between evaluations; 0: only at the end")
    checkpoint_every: int = Field(100, ge=0, description="steps between checkpoints; 0: only at the end")
    keep_checkpoints: int = Field(2, ge=1, description="newest complete checkpoints kept")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: autocast over float32 weights")
    recompute: Recompute = Field(
        "none",
        description="what the backward pass computes again instead of keeping it: attention's probabilities, or all of "
        "a block but its input (full)",
    )
    seed: int = Field(0, ge=0)
    hang_timeout_s: float = Field(
        600,
        ge=0,
        description="a worker without progress for so long writes its stacks and is restarted (up to the first step "
        "three times as long); must exceed the slowest micro-batch; 0: wait for ever",
    )
    sample_prompt: str = Field("", description="start of the text sampled at the end")
    sample_tokens: int = Field(0, ge=0, description="tokens sampled at the end; 0: none")


class Run(Section):
    name: str = Field("pretrain", description="the run's name: the same name resumes")
    storage: str = Field("runs", description="folder of run folders; every node must see it")
    tracking_uri: str | None = Field(None, description="MLflow server; default: sqlite in run.storage")
    experiment: str = Field("finhpc", description="MLflow experiment")
    max_failures: int = Field(3, ge=0, description="worker failures survived by restarting from the checkpoint")


class Resources(Section):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    cpus_per_worker: float = Field(1, gt=0, description="CPUs Ray reserves for a worker")
    threads: int = Field(1, ge=1, description="torch threads a worker")
    gpus_per_worker: float = Field(1, gt=0, description="GPUs Ray reserves for a worker when device is cuda")


class Quantization(Section):
    """How many bits the trained weights have. One vector: an output row of a matrix, or a row of an embedding."""

    bits: Literal[16, 8, 4] = Field(16, description="bits a weight; 16: not quantised")
    scheme: Literal["minmax"] = Field("minmax", description="per vector, from its minimum and maximum")
    when: Literal["after", "during"] = Field(
        "after", description="during: trained with rounded weights in the forward pass; after: see `finhpc export`"
    )

    @property
    def training_bits(self) -> int:
        """Bits of the weights that training computes with."""
        return self.bits if self.when == "during" else 16


class PretrainConfig(Section):
    """Settings of `finhpc pretrain`."""

    model: Model = Field(default_factory=Model)
    method: Method = Field(default_factory=Method)
    data: Data = Field(default_factory=Data)
    optimizer: Optimizer = Field(default_factory=Optimizer)
    parallel: Parallel = Field(default_factory=Parallel)
    train: Train = Field(default_factory=Train)
    quantization: Quantization = Field(default_factory=Quantization)
    run: Run = Field(default_factory=Run)
    resources: Resources = Field(default_factory=Resources)


class ExportQuantization(Section):
    bits: Literal[16, 8, 4] = Field(16, description="bits a weight; 16: not quantised")
    scheme: Literal["minmax", "int8", "nf4"] = Field(
        "minmax", description="minmax: per vector, 8 or 4 bits, opened with finhpc; int8 (8), nf4 (4): bitsandbytes"
    )


class ExportConfig(Section):
    """Settings of `finhpc export`."""

    model: str = Field("", description="a model folder: a run's `model`, or a dense one of the same families")
    format: Literal["native", "merged"] = Field(
        "native", description="native: low-rank as it is; merged: B A multiplied out, opened without finhpc"
    )
    out: str = Field("", description="new folder for the exported model")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of weights that are not quantised; auto: as in the model"
    )
    quantization: ExportQuantization = Field(default_factory=ExportQuantization)


class Estimate(Section):
    """The hardware that is planned for, and how."""

    device: str = Field(
        "a100-80gb", description="v100-32gb, a100-40gb, a100-80gb, h100-80gb, h200-141gb, or this-machine (measured)"
    )
    nodes: int = Field(1, ge=1, description="machines")
    devices_per_node: int | None = Field(
        None, ge=1, description="devices of each; default: 8, on this machine its cores by resources.threads"
    )
    memory_gb: float | None = Field(None, gt=0, description="a device's memory; default: as its maker states")
    tflops: float | None = Field(None, gt=0, description="its matrix rate at train.precision; default: as stated")
    reached: float = Field(
        0.4,
        gt=0,
        le=1,
        description="share of that rate that training reaches; Table I's GPU hours of Llama 2 on A100s amount to "
        "0.38 to 0.43",
    )
    usable: float = Field(
        0.9, gt=0, le=1, description="share of the memory for tensors; the rest: libraries, fragments between tensors"
    )
    link_gb_per_s: float | None = Field(None, gt=0, description="to a device of the node, each way; default: as stated")
    network_gb_per_s: float | None = Field(None, gt=0, description="to a device of another node; default: as stated")
    scheme: Literal["finhpc", "paper"] = Field(
        "finhpc",
        description="finhpc: what its engine holds, counted from its code; paper: 16-bit weights and gradients, 12 "
        "bytes of optimiser and Table IV's variables",
    )
    zero_stage: int = Field(
        0, ge=0, le=3, description="shares out optimiser (1), gradients (2), weights (3); paper only"
    )
    weight_bits: Literal[16, 8, 4] = Field(16, description="of the stored weights; paper only")
    samples_per_step: int | None = Field(
        None, ge=1, description="of the topologies compared; default: as `parallel` says"
    )
    micro_batch_sizes: list[int] = Field([1, 2, 4, 8, 16], min_length=1, description="sizes tried in the topologies")
    show: int = Field(10, ge=1, description="topologies shown")


class EstimateConfig(PretrainConfig):
    """Settings of `finhpc estimate`: those of the run, and the hardware."""

    estimate: Estimate = Field(default_factory=Estimate)


class Variant(Section):
    """One way to train, beside the others of a study."""

    settings: dict[str, Any] = Field(default_factory=dict, description="sections of settings, over the study's own")
    lr: list[float] = Field(min_length=1, description="learning rates that are screened")
    start: str | None = Field(None, description="the variant whose trained model it starts from (model.path)")


class Study(Section):
    """Which variants of the run are compared, and how."""

    variants: dict[str, Variant] = Field(default_factory=dict, description="name -> settings, lr, start")
    reference: str = Field("dense", description="the variant that the others are compared with")
    screen_steps: int = Field(300, ge=1, description="steps of the screening; train.steps: of the finals")
    finalists: int = Field(2, ge=0, description="best variants that go on beside the reference; 0: all")
    seeds: list[int] = Field([0, 1, 2], min_length=1, description="seeds of the finals; the first also screens")
    pace_steps: int = Field(20, ge=1, description="steps a round in which a finalist's step time is measured")
    pace_rounds: int = Field(3, ge=1, description="such rounds, the finalists in turn")


class StudyConfig(PretrainConfig):
    """Settings of `finhpc study`: those that its runs share, and what they differ in."""

    study: Study = Field(default_factory=Study)


class PrepareConfig(Section):
    """Settings of `finhpc prepare`."""

    source: list[str] = Field(
        default_factory=list, description="files or folders of text, hf:NAME, or docs (repeat for several)"
    )
    tokenizer: str = Field("train:8192", description="gpt2, a tokeniser folder or hub id, or train:N")
    out: str = Field("", description="folder for the shards")
    block_len: int = Field(1024, ge=2, description="tokens a block (a row of a shard)")
    shard_blocks: int = Field(4096, ge=1, description="blocks a shard")
    val_fraction: float = Field(0.01, gt=0, lt=1, description="share of documents held out, chosen by hash")
    text_field: str = Field("text", description="field or column that holds the text")
    hf_split: str = Field("train", description="split of an hf: source")
    on_error: Literal["strict", "skip"] = Field("strict", description="what a broken record does; skips are counted")
    workers: int = Field(0, ge=0, description="parallel tasks; 0: one a core")


class Calibration(Section):
    """Text that whitening looks at."""

    source: list[str] = Field(default_factory=list, description="files or folders of text, as for prepare")
    text_field: str = Field("text", description="field or column that holds the text")
    samples: int = Field(64, ge=1, description="blocks of text")
    seq_len: int = Field(512, ge=2, description="tokens a block")


class DecomposeConfig(Section):
    """Settings of `finhpc decompose`."""

    model: str = Field("", description="dense model: a Hugging Face folder, a hub id or a .gguf file")
    out: str = Field("", description="folder for the low-rank model")
    rank: int | None = Field(None, description="rank of every layer that `ranks` does not name")
    ranks: dict[str, int] = Field(
        default_factory=dict,
        description=f"rank for a kind of layer: any of {', '.join(LINEAR_KINDS)}; without rank or keep_*, "
        "kinds not named stay dense",
    )
    keep_params: float | None = Field(None, gt=0, le=1, description="share of each layer's parameters kept")
    keep_energy: float | None = Field(
        None, gt=0, le=1, description="share of each layer's squared singular values kept, by the smallest rank"
    )
    embedding: Literal["dense", "low_rank"] = Field("dense", description="the token embedding")
    head: Literal["dense", "low_rank"] = Field(
        "dense", description="the output layer; a tied one is untied where it or the embedding is low-rank"
    )
    whiten: bool = Field(False, description="best for the layers' outputs on calibration.source, not for the weights")
    calibration: Calibration = Field(default_factory=Calibration)
    workers: int = Field(0, ge=0, description="parallel tasks; 0: as many as the cluster has room for")
    resources: Resources = Field(default_factory=Resources)


class UiConfig(Section):
    """Settings of `finhpc ui`."""

    run: Run = Field(default_factory=Run)
    port: int = Field(5000, ge=1, le=65535, description="port on 127.0.0.1")


C = TypeVar("C", bound=Section)


def recipes() -> dict[str, Path]:
    """Named configs that ship with finhpc: name -> YAML file; a study's is studies/NAME."""
    folder = Path(str(files("finhpc") / "recipes"))
    paths = (*sorted(folder.glob("*.yaml")), *sorted(folder.glob("studies/*.yaml")))
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths}


def load(cls: type[C], source: str | None, overrides: dict[str, Any] | None = None) -> C:
    """Resolve defaults < `source` (a recipe's name or a YAML file) < `overrides` ({"a.b": value}).

    Raises `ConfigError` with every unknown key and every bad value.
    """
    tree = _read(source) if source else {}
    for dotted, value in (overrides or {}).items():
        _put(tree, dotted, value)
    return build(cls, tree)


def build(cls: type[C], tree: dict[str, Any]) -> C:
    """Validate a nested dictionary; every problem in one `ConfigError`."""
    try:
        return cls.model_validate(_over_own_defaults(cls, tree))
    except ValidationError as error:
        raise ConfigError([_explain(cls, dict(item)) for item in error.errors()]) from None


def _over_own_defaults(cls: type[Section], tree: dict[str, Any]) -> dict[str, Any]:
    """`tree`, with a section given in part completed by what `cls` says of it, not by the section's class alone."""
    for name, field in cls.model_fields.items():
        given, kind = tree.get(name), field.annotation
        if isinstance(given, dict) and isinstance(kind, type) and issubclass(kind, Section):
            own: Section = field.get_default(call_default_factory=True)
            tree = tree | {name: own.model_dump(exclude_unset=True) | _over_own_defaults(kind, given)}
    return tree


def to_yaml(config: Section) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def keys(cls: type[Section], prefix: str = "") -> dict[str, Any]:
    """Dotted name -> field of every leaf setting."""
    found: dict[str, Any] = {}
    for name, field in cls.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            found |= keys(kind, f"{prefix}{name}.")
        else:
            found[prefix + name] = field
    return found


def flatten(config: Section) -> dict[str, Any]:
    """Dotted name -> value of every leaf setting."""
    flat: dict[str, Any] = {}
    for dotted in keys(type(config)):
        value: Any = config
        for part in dotted.split("."):
            value = getattr(value, part)
        flat[dotted] = value
    return flat


def nearest(name: str, valid: list[str]) -> str:
    """', nearest: X' for a mistyped name, or the whole list when nothing is near."""
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]}?"
    return f"valid: {', '.join(valid)}." if len(valid) <= 20 else "--help lists all."


def _read(source: str) -> dict[str, Any]:
    known = recipes()
    path = known.get(source, Path(source))
    if not path.is_file():
        if os.sep in source or source.endswith((".yaml", ".yml")):
            raise ConfigError(f"config={source} is not a file; give a YAML file or one of: {', '.join(known)}.")
        raise ConfigError(f"config={source} is no recipe; {nearest(source, list(known))}")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config={source} is not valid YAML: {error}; correct that line.") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"config={source} must hold sections (`model:`, `train:`, ...), not {type(tree).__name__}.")
    return tree


def _put(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, leaf = dotted.split(".")
    for part in parents:
        inner = tree.setdefault(part, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{dotted}: {part} is a value, not a section; valid keys are in --help.")
        tree = inner
    tree[leaf] = value


def _explain(cls: type[Section], item: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"{where} is not a setting; {nearest(where, list(keys(cls)))}"
    field = keys(cls).get(where)
    hint = ""
    if item["type"] == "literal_error" and field is not None:
        near = difflib.get_close_matches(str(item["input"]), [str(a) for a in get_args(field.annotation)], n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
    elif field is not None and field.description:
        hint = f" ({where}: {field.description})"
    reason = item["msg"][0].lower() + item["msg"][1:]
    return f"{where}={item['input']!r} is refused: {reason}{hint}."
