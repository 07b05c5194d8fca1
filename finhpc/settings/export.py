"""Settings of `finhpc export`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from finhpc.settings.base import Plugins, Section, plugins_field


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
