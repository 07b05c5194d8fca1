"""Settings of a pretraining run, and of what plans and compares such runs."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from finhpc.settings.base import MAY_CHANGE, LocalPath, ModelPath, Plugins, Section, plugins_field
from finhpc.settings.training import Optimizer, Parallel, Resources, Run, Train

OF_PRESET: dict[str, Any] = {"default": "the preset's"}  # what help shows in place of None
LINEAR_KINDS = ("attention", "mlp", "head", "embedding")


class Model(Section):
    """Which transformer. A preset names a shape; the other keys change parts of it. Or `path`, which brings its own."""

    path: ModelPath | None = Field(
        None,
        description="model folder whose weights training starts from, dense or low-rank, with its own shape; default: "
        "weights are drawn",
        json_schema_extra=MAY_CHANGE,
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
    blend_share: float = Field(
        0.5, gt=0, le=1, description="share of train.steps after which alpha is 0 (blend)", json_schema_extra=MAY_CHANGE
    )
    blend_schedule: Literal["linear", "cosine"] = Field("linear", description="how alpha falls (blend)")
    blend_weight: Literal["frozen", "trainable"] = Field(
        "frozen", description="whether W is trained too, as long as it is there (blend)"
    )

    def blend_steps(self, steps: int) -> int:
        """Return the first of `steps` steps (from 1) that is taken without W (blend)."""
        return round(self.blend_share * steps)

    def problems(self, steps: int) -> list[str]:
        """Return what does not work in a training of `steps`, with its remedy."""
        if self.kind != "blend" or (count := self.blend_steps(steps)) >= 2:
            return []
        return [
            f"method.blend_share={self.blend_share} of train.steps={steps} is {count} steps, too few for alpha to "
            "fall; raise one of them, or use method.kind=svd."
        ]


class Data(Section):
    shards: LocalPath | None = Field(
        None, description="folder written by `finhpc prepare`; required to train", json_schema_extra=MAY_CHANGE
    )
    seq_len: int = Field(256, ge=2, description="tokens a sample; must divide the shards' block length")
    eval_samples: int = Field(128, ge=1, description="held-out samples scored at each evaluation")


class Quantization(Section):
    """How many bits the trained weights have. One vector: an output row of a matrix, or a row of an embedding."""

    bits: Literal[16, 8, 4] = Field(16, description="bits a weight; 16: not quantised")
    scheme: Literal["minmax"] = Field("minmax", description="per vector, from its minimum and maximum")
    when: Literal["after", "during"] = Field(
        "after", description="during: trained with rounded weights in the forward pass; after: see `finhpc export`"
    )

    def problems(self, optimizer: Optimizer) -> list[str]:
        """Return what is contradictory, each with its remedy."""
        problems = []
        if self.bits < 16 and self.when == "after":
            problems.append(
                f"quantization.bits={self.bits} with quantization.when=after does not change training; leave it at 16 "
                f"and quantize the trained model with `finhpc export --quantization.bits {self.bits}`, or use "
                "quantization.when=during."
            )
        if self.bits == 16 and self.when == "during":
            problems.append("quantization.when=during needs quantization.bits=8 or 4; at 16 nothing is quantized.")
        if optimizer.decay == "product" and self.training_bits < 16:
            problems.append(
                "optimizer.decay=product does not work on rounded weights; use optimizer.decay=factors with "
                "quantization.when=during."
            )
        return problems

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
