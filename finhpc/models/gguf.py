"""The weights of a GGUF file, dequantised one at a time.

transformers knows the names and the order of each architecture's weights, the `gguf` package the
formats; transformers' own loader would hold the whole model in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
    load_gguf_checkpoint,
)

from finhpc.errors import CheckpointError, ConfigError
from finhpc.models.families import FAMILIES, skeleton


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in the file, and how it is packed."""

    gguf_name: str
    offset: int
    packed_shape: tuple[int, ...]
    packed_dtype: Any
    kind: Any


class GgufFile:
    """Hugging Face name -> tensor of a GGUF file. Only the tensor that is asked for is read."""

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        self.path = path
        try:
            parsed = load_gguf_checkpoint(str(path))["config"]
            reader = GGUFReader(path)
        except Exception as error:  # the reader trusts the file: damage shows as whatever error comes first
            reason = str(error).strip().splitlines()[0].rstrip(".") if str(error) else type(error).__name__
            raise CheckpointError(f"{path} is cut short, damaged or no GGUF file ({reason}); fetch it again.") from None
        kind = parsed.pop("model_type")
        if kind not in FAMILIES:
            raise ConfigError(f"model_type={kind} of {path} is not supported; supported: {', '.join(FAMILIES)}.")
        self.config: Any = FAMILIES[kind].dense_class.config_class.from_dict(parsed)
        self._processor = TENSOR_PROCESSORS.get(kind, TensorProcessor)(config=parsed)
        names = get_gguf_hf_weights_map(skeleton(self.config), self._processor)
        names["output.weight"] = "lm_head.weight"
        self._places: dict[str, _Place] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for tensor in reader.tensors:
            if (name := names.get(tensor.name)) is None:
                continue
            self._places[name] = _Place(
                tensor.name, int(tensor.data_offset), tensor.data.shape, tensor.data.dtype, tensor.tensor_type
            )
            # The file counts dimensions from the fastest; its processor turns some of GPT-2's.
            shape = tuple(int(size) for size in reversed(tensor.shape))
            self.shapes[name] = tuple(self._process(tensor.name, np.broadcast_to(np.float32(0), shape)).shape)

    def read(self, name: str) -> Tensor:
        from gguf import dequantize

        place = self._places[name]
        # Read, not mapped: mapped pages would count as this process's memory.
        count = int(np.prod(place.packed_shape))
        packed = np.fromfile(self.path, place.packed_dtype, count, offset=place.offset).reshape(place.packed_shape)
        weights = self._process(place.gguf_name, dequantize(packed, place.kind))
        return torch.from_numpy(np.ascontiguousarray(weights, dtype=np.float32))

    def _process(self, gguf_name: str, weights: Any) -> Any:
        """The tensor as Hugging Face orders it: Llama's queries and keys are permuted, GPT-2's matrices turned."""
        if gguf_name == "output.weight":
            return weights
        return self._processor.process(weights=weights, name=gguf_name).weights
