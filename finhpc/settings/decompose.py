"""Settings of `finhpc decompose`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from finhpc.settings.base import Plugins, Section, plugins_field
from finhpc.settings.pretrain import RANKS, Qkv, qkv_field
from finhpc.settings.training import Resources


class Calibration(Section):
    """Text for whitening."""

    source: list[str] = Field(
        default_factory=list, description="files or folders of text, as for prepare; required by whiten"
    )
    text_field: str = Field("text", description="field or column with the text")
    samples: int = Field(64, ge=1, description="blocks of text")
    seq_len: int = Field(512, ge=2, description="tokens per block")


class DecomposeConfig(Section):
    """Settings of `finhpc decompose`."""

    model: str = Field("", description="dense model: a Hugging Face folder, a hub id or a .gguf file; required")
    out: str = Field("", description="folder for the low-rank model; required")
    rank: int | None = Field(
        None, description="rank of every layer that `ranks` does not name; default: by ranks or keep_*"
    )
    ranks: dict[str, int] = Field(
        default_factory=dict,
        description=f"rank by kind of layer: {RANKS}; without rank or keep_*, layers not named stay dense",
    )
    qkv: Qkv = qkv_field()
    keep_params: float | None = Field(
        None, gt=0, le=1, description="share of the parameters of each layer to keep; default: by rank"
    )
    keep_energy: float | None = Field(
        None, gt=0, le=1, description="share of the squared singular values of each layer to keep; default: by rank"
    )
    embedding: Literal["dense", "low_rank"] = Field("dense", description="kind of the token embedding")
    head: Literal["dense", "low_rank"] = Field(
        "dense", description="kind of the output layer; untied from the embedding if one of the two is low-rank"
    )
    whiten: bool = Field(False, description="minimize the error of outputs on calibration.source, not that of weights")
    calibration: Calibration = Field(default_factory=Calibration)
    workers: int = Field(0, ge=0, description="parallel tasks; 0: as many as fit the cluster")
    resources: Resources = Field(default_factory=Resources)
    plugins: Plugins = plugins_field()
