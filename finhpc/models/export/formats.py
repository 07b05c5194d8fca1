"""The formats for other runtimes: `format` of `finhpc export` -> how it is written."""

from __future__ import annotations

from finhpc.models.export.executorch_file import Executorch
from finhpc.models.export.gguf_file import Gguf
from finhpc.models.export.onnx_file import Onnx
from finhpc.models.export.runtime import Runtime

RUNTIMES: dict[str, Runtime] = {"gguf": Gguf(), "onnx": Onnx(), "executorch": Executorch()}
