"""Settings of `finhpc pretrain`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from finhpc.settings.base import MAY_CHANGE, LocalPath, ModelPath, Plugins, Section, plugins_field
from finhpc.settings.training import Optimizer, Parallel, Resources, Run, Train

OF_PRESET: dict[str, Any] = {"default": "the preset's"}  # shown by help in place of None
LINEAR_KINDS = ("attention", "mlp", "head", "embedding")
PROJECTIONS = ("qkv", "out", "up", "down")  # of attention, and of the MLP; a gate counts as up
Qkv = Literal["joint", "separate"]
RANKS = f"{', '.join(LINEAR_KINDS)}; or of one projection: {', '.join(PROJECTIONS)}"


def qkv_field() -> Any:
    return Field(
        "joint",
        description="joint: one pair for a layer that computes queries, keys and values at once (GPT-2); separate: a "
        "pair of that rank for each; in Llama-like models they are separate layers already",
    )


class Model(Section):
    """The transformer: a preset, parts of which the other keys change; or `path`, which defines its own shape."""

    path: ModelPath | None = Field(
        None,
        description="folder of a dense or low-rank model to start from, which defines the shape; default: random "
        "initial weights",
        json_schema_extra=MAY_CHANGE,
    )
    preset: str = Field("gpt2-tiny", description="named shape, listed below")
    layers: int | None = Field(None, ge=1, description="transformer blocks", json_schema_extra=OF_PRESET)
    width: int | None = Field(None, ge=1, description="hidden size", json_schema_extra=OF_PRESET)
    heads: int | None = Field(None, ge=1, description="attention heads", json_schema_extra=OF_PRESET)
    kv_heads: int | None = Field(None, ge=1, description="key/value heads (Llama)", json_schema_extra=OF_PRESET)
    mlp_width: int | None = Field(None, ge=1, description="inner size of the MLP", json_schema_extra=OF_PRESET)
    context: int | None = Field(None, ge=2, description="longest sequence, in tokens", json_schema_extra=OF_PRESET)
    vocab_size: int | None = Field(None, ge=2, description="vocabulary size; default: that of the shards' tokenizer")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout of embeddings, attention and residuals (GPT-2)")
    tie_embeddings: bool | None = Field(
        None,
        description="one matrix for embedding and head, if both are dense; default: as in the preset",
    )


class Method(Section):
    """What a linear layer computes."""

    kind: str = Field(
        "low_rank",
        description="dense; low_rank: y = B(A x) from scratch (method 1); svd: low_rank, started from the factors of "
        "model.path (method 2); blend: y = alpha W x + (1 - alpha) B A x, alpha falling to 0 (method 3; without "
        "model.path self-guided training); cola: "
        "y = B silu(A x); half: y = B [A1 x ; silu(A2 x)]; sltrain: y = (lora_alpha / rank) B A x + S x, S sparse",
    )
    rank: int = Field(64, description="rank of every layer that `ranks` does not name")
    ranks: dict[str, int] = Field(default_factory=dict, description=f"rank by kind of layer: {RANKS}; default: rank")
    qkv: Qkv = qkv_field()
    init: Literal["spectral", "normal", "cola", "dlr"] | None = Field(
        None,
        description="initial A and B; normal: random, with the variance of the dense initialization in B A; spectral: "
        "the SVD of a dense initialization, split into square roots; cola: normal, of CoLA's size; dlr: cola, plus "
        "copies of the latent, which weight decay leaves; default: normal, cola for kinds cola and half, sltrain's own",
    )
    embedding: Literal["dense", "low_rank"] = Field("dense", description="kind of the token embedding")
    head: Literal["low_rank", "dense"] = Field("low_rank", description="kind of the output layer")
    sparse_share: float = Field(0.03, gt=0, le=0.5, description="sltrain: share of the entries of S that are trained")
    lora_alpha: float = Field(32.0, gt=0, description="sltrain: B A is multiplied by lora_alpha / rank")
    blend_start: float = Field(0.99, gt=0, le=1, description="blend: alpha in the first step")
    blend_share: float = Field(
        0.5, gt=0, le=1, description="blend: share of train.steps after which alpha is 0", json_schema_extra=MAY_CHANGE
    )
    blend_schedule: Literal["linear", "cosine"] = Field("linear", description="blend: how alpha falls")
    blend_weight: Literal["frozen", "trainable"] = Field(
        "frozen", description="blend: whether W is trained too until alpha is 0"
    )

    def blend_steps(self, steps: int) -> int:
        """Return the first of `steps` steps (from 1) that is taken without W (blend)."""
        return round(self.blend_share * steps)

    def problems(self, steps: int, optimizer: Optimizer) -> list[str]:
        """Return what does not work in a training of `steps`, with its remedy."""
        problems = []
        if self.kind == "blend" and (count := self.blend_steps(steps)) < 2:
            problems.append(
                f"method.blend_share={self.blend_share} of train.steps={steps} is {count} steps, too few for alpha to "
                "fall; raise one of them, or use method.kind=svd."
            )
        if self.kind == "sltrain" and self.init is not None:
            problems.append(
                f"method.init={self.init} does not fit method.kind=sltrain, whose B starts at 0 next to a random S; "
                "leave it out."
            )
        if self.init == "dlr" and self.kind != "dense" and optimizer.decay == "product":
            problems.append(
                "optimizer.decay=product would shrink the copies of the latent that method.init=dlr keeps; use "
                "optimizer.decay=factors, or another init."
            )
        return problems


class Data(Section):
    """The token shards."""

    shards: LocalPath | None = Field(
        None, description="folder written by `finhpc prepare`; required to train", json_schema_extra=MAY_CHANGE
    )
    seq_len: int = Field(256, ge=2, description="tokens per sample; must divide the block length of the shards")
    eval_samples: int = Field(128, ge=1, description="held-out samples to score at each evaluation")
    final_samples: int = Field(
        0,
        ge=0,
        description="held-out samples, at even distances, to score the trained model on, for a loss with its standard "
        "error; 0: none",
    )


class Quantization(Section):
    """Bits of the trained weights. A vector is an output row of a matrix, or a row of an embedding."""

    bits: Literal[16, 8, 4] = Field(16, description="bits per weight; 16: not quantized")
    scheme: Literal["minmax"] = Field("minmax", description="minmax: per vector, from its minimum and maximum")
    when: Literal["after", "during"] = Field(
        "after", description="during: train with rounded weights in the forward pass; after: see `finhpc export`"
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
        """Bits of the weights in the forward pass of training."""
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

    def problems(self) -> list[str]:
        """Return every contradiction between settings, each with its remedy."""
        return [
            *self.parallel.problems(),
            *self.quantization.problems(self.optimizer),
            *self.method.problems(self.train.steps, self.optimizer),
            *self.optimizer.problems(self.train.steps),
            *self._sltrain_problems(),
        ]

    def _sltrain_problems(self) -> list[str]:
        if self.method.kind != "sltrain" or self.quantization.training_bits == 16:
            return []
        return [
            "quantization.when=during rounds matrices, and the entries of S of method.kind=sltrain are not one; use "
            "quantization.bits=16, and quantize the trained model with `finhpc export --format merged`."
        ]
