"""Settings of a pretraining run, and of what plans and compares such runs."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from finhpc.settings.base import Plugins, Section, plugins_field
from finhpc.settings.training import Optimizer, Parallel, Resources, Run, Train

OF_PRESET: dict[str, Any] = {"default": "the preset's"}  # what help shows in place of None
LINEAR_KINDS = ("attention", "mlp", "head", "embedding")


class Model(Section):
    """Which transformer. A preset names a shape; the other keys change parts of it. Or `path`, which brings its own."""

    path: str | None = Field(
        None,
        description="model folder whose weights training starts from, dense or low-rank, with its own shape; default: "
        "weights are drawn",
    )
    preset: str = Field("gpt2-tiny", description="named shape; `finhpc pretrain --help` lists them")
    layers: int | None = Field(None, ge=1, description="transformer blocks", json_schema_extra=OF_PRESET)
    width: int | None = Field(None, ge=1, description="hidden size", json_schema_extra=OF_PRESET)
    heads: int | None = Field(None, ge=1, description="attention heads", json_schema_extra=OF_PRESET)
    kv_heads: int | None = Field(None, ge=1, description="key/value heads (Llama)", json_schema_extra=OF_PRESET)
    mlp_width: int | None = Field(
        None, ge=1, description="inner size of the feed-forward part", json_schema_extra=OF_PRESET
    )
    context: int | None = Field(
        None, ge=2, description="longest sequence the model can take", json_schema_extra=OF_PRESET
    )
    vocab_size: int | None = Field(None, ge=2, description="default: the shards' tokeniser's")
    dropout: float = Field(0.0, ge=0, lt=1, description="of embeddings, attention and residuals (GPT-2)")
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
        default_factory=dict, description=f"rank for a kind of layer: any of {', '.join(LINEAR_KINDS)}; default: rank"
    )
    init: Literal["spectral", "normal", "cola"] | None = Field(
        None,
        description="how A and B start; normal: drawn, so that B A has the dense initialisation's variance; spectral: "
        "that one's SVD, split as square roots; default: normal, cola for kind cola",
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
    shards: str | None = Field(None, description="folder written by `finhpc prepare`; required to train")
    seq_len: int = Field(256, ge=2, description="tokens a sample; must divide the shards' block length")
    eval_samples: int = Field(128, ge=1, description="held-out samples scored at each evaluation")


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
    plugins: Plugins = plugins_field()


class Hardware(Section):
    """The hardware that is planned for."""

    device: str = Field(
        "a100-80gb",
        description="v100-32gb, a100-40gb, a100-80gb, h100-80gb, h200-141gb, rtx-3090-24gb, rtx-4090-24gb, "
        "rtx-5090-32gb, rtx-a6000-48gb, rtx-6000-ada-48gb, l40s-48gb, l4-24gb, a10-24gb, t4-16gb, or this-machine "
        "(measured)",
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


class Estimate(Hardware):
    """The hardware, and how it is planned for."""

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
