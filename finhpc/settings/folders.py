"""Settings of the verbs that turn one folder into another: prepare, export, decompose, ui."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from finhpc.settings.base import Plugins, Section, plugins_field
from finhpc.settings.pretrain import LINEAR_KINDS
from finhpc.settings.training import Resources, Run


class ExportQuantization(Section):
    bits: Literal[16, 8, 4] = Field(16, description="bits a weight; 16: not quantised")
    scheme: Literal["minmax", "int8", "nf4"] = Field(
        "minmax", description="minmax: per vector, 8 or 4 bits, opened with finhpc; int8 (8), nf4 (4): bitsandbytes"
    )


class ExportConfig(Section):
    """Settings of `finhpc export`."""

    model: str = Field("", description="a model or adapter folder, a hub id or a .gguf file")
    format: Literal["native", "merged"] = Field(
        "native", description="native: low-rank as it is; merged: B A multiplied out, opened without finhpc"
    )
    out: str = Field("", description="new folder for the exported model")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of weights that are not quantised; auto: as in the model"
    )
    quantization: ExportQuantization = Field(default_factory=ExportQuantization)
    plugins: Plugins = plugins_field()


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
    rank: int | None = Field(
        None, description="rank of every layer that `ranks` does not name; default: by ranks or keep_*"
    )
    ranks: dict[str, int] = Field(
        default_factory=dict,
        description=f"rank for a kind of layer: any of {', '.join(LINEAR_KINDS)}; without rank or keep_*, "
        "kinds not named stay dense",
    )
    keep_params: float | None = Field(
        None, gt=0, le=1, description="share of each layer's parameters kept; default: by rank"
    )
    keep_energy: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of each layer's squared singular values kept, by the smallest rank; default: by rank",
    )
    embedding: Literal["dense", "low_rank"] = Field("dense", description="the token embedding")
    head: Literal["dense", "low_rank"] = Field(
        "dense", description="the output layer; a tied one is untied where it or the embedding is low-rank"
    )
    whiten: bool = Field(False, description="best for the layers' outputs on calibration.source, not for the weights")
    calibration: Calibration = Field(default_factory=Calibration)
    workers: int = Field(0, ge=0, description="parallel tasks; 0: as many as the cluster has room for")
    resources: Resources = Field(default_factory=Resources)
    plugins: Plugins = plugins_field()


class UiConfig(Section):
    """Settings of `finhpc ui`."""

    run: Run = Field(default_factory=Run)
    port: int = Field(5000, ge=1, le=65535, description="port on 127.0.0.1")
