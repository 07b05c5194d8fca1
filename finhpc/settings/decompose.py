"""Settings of `finhpc decompose`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from finhpc.settings.base import Plugins, Section, plugins_field
from finhpc.settings.pretrain import LINEAR_KINDS
from finhpc.settings.training import Resources


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
