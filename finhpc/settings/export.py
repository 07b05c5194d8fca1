"""Settings of `finhpc export`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from finhpc.settings.base import LocalPath, Plugins, Section, plugins_field


class ExportQuantization(Section):
    """How to store the weights."""

    bits: Literal[16, 8, 4] = Field(16, description="bits per weight; 16: not quantized")
    scheme: str = Field(
        "minmax",
        description="minmax: per vector, 8 or 4 bits, needs finhpc to open; int8 (8 bits), nf4 (4 bits): bitsandbytes; "
        "not for gguf, onnx and executorch, which have their own",
    )


class ExportConfig(Section):
    """Settings of `finhpc export`."""

    model: str = Field("", description="model or adapter folder, hub id or .gguf file; required")
    average: list[LocalPath] = Field(
        default_factory=list,
        description="more adapters of the same base: what the mean of `model` and these adds to the base is exported",
    )
    rank: int | None = Field(
        None, ge=1, description="lower the rank of the exported adapter, by SVD; default: the sum of what is averaged"
    )
    adapters: list[str] = Field(
        default_factory=list,
        description="NAME=FOLDER of adapters of `model`, each exported as its own file (gguf and onnx; repeatable)",
    )
    format: Literal["native", "merged", "adapter", "gguf", "onnx", "executorch"] = Field(
        "native",
        description="native: as it is, low-rank; merged: B A multiplied out, opens without finhpc; adapter: a new "
        "adapter in peft's format; gguf: merged, a file for llama.cpp; onnx: as it is, a folder for onnxruntime-genai; "
        "executorch: as it is, a program for ExecuTorch",
    )
    out: str = Field("", description="new folder for the exported model; required")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="type of weights that are not quantized; auto: as in the model"
    )
    quantization: ExportQuantization = Field(default_factory=ExportQuantization)
    plugins: Plugins = plugins_field()
