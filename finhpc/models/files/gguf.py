"""A GGUF file: its weights, dequantized one at a time, and its tokenizer.

transformers knows the names and order of each architecture's weights, the `gguf` package the formats; transformers' own
loader would need memory for the whole model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
    load_gguf_checkpoint,
)

from finhpc.errors import CheckpointError, ConfigError
from finhpc.models.families.registry import FAMILIES, skeleton
from finhpc.models.files.tokenizer import opens_or_refuses

LONG = ("tokenizer.ggml.tokens", "tokenizer.ggml.scores", "tokenizer.ggml.token_type", "tokenizer.ggml.merges")
# Settings under the architecture's name that transformers applies, or that change nothing for the supported families.
APPLIED = {
    *("context_length", "embedding_length", "block_count", "feed_forward_length", "vocab_size", "rope.freq_base"),
    *("rope.dimension_count", "attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon"),
    *("attention.layer_norm_epsilon", "rope.scaling.type", "rope.scaling.factor", "attention.causal"),
    *("attention.key_length", "attention.value_length", "attention.sliding_window", "tensor_data_layout"),
}


@dataclass(frozen=True)
class _Place:
    """Where a tensor is in the file, and how it is stored."""

    gguf_name: str
    offset: int
    packed_shape: tuple[int, ...]
    packed_dtype: Any
    kind: Any


class GgufFile:
    """Reads tensors of a GGUF file by Hugging Face name, one at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.suffix.lower() != ".gguf":
            raise ConfigError(f"model={path} is not a .gguf file; give a Hugging Face folder or a .gguf file.")
        try:
            stat = path.stat()
            config, reader = _parsed(path, stat.st_size, stat.st_mtime_ns)
        except Exception as error:  # the reader does not check the file: damage can raise any error
            reason = str(error).strip().splitlines()[0].rstrip(".") if str(error) else type(error).__name__
            raise CheckpointError(f"{path} is cut short, damaged or no GGUF file ({reason}); fetch it again.") from None
        parsed = dict(config)
        kind = parsed.pop("model_type")
        known = [name for name, family in FAMILIES.items() if family.gguf]
        if kind not in known:
            raise ConfigError(f"model_type={kind} of {path} is not supported as GGUF; supported: {', '.join(known)}.")
        values = {name: field.contents() for name, field in reader.fields.items() if name not in LONG}
        parsed |= _config_fields(path, kind, values)
        self.tokens = (
            len(reader.fields["tokenizer.ggml.tokens"].data) if "tokenizer.ggml.tokens" in reader.fields else 0
        )
        self.config: Any = FAMILIES[kind].dense_class.config_class.from_dict(parsed | {"dtype": "float32"})
        self._processor = TENSOR_PROCESSORS.get(kind, TensorProcessor)(config=parsed)
        names = get_gguf_hf_weights_map(skeleton(self.config), self._processor)
        names["output.weight"] = "lm_head.weight"
        self._places: dict[str, _Place] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.quantized: dict[str, str] = {}  # empty: every format is read as floats
        for tensor in reader.tensors:
            if (name := names.get(tensor.name)) is None:
                self.shapes[tensor.name] = tuple(int(size) for size in reversed(tensor.shape))  # unknown
                continue
            self._places[name] = _Place(
                tensor.name, int(tensor.data_offset), tensor.data.shape, tensor.data.dtype, tensor.tensor_type
            )
            # The file lists dimensions from the fastest; the processor transposes some of GPT-2's.
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

    def tokenizer(self) -> Any:
        """Open the file's tokenizer with only its own tokens; transformers adds those of its class.

        Raises `ConfigError` if there is none that opens.
        """
        with opens_or_refuses(self.path):
            tokenizer = AutoTokenizer.from_pretrained(self.path.parent, gguf_file=self.path.name)
            tree = json.loads(tokenizer.backend_tokenizer.to_str())
            tree["added_tokens"] = [token for token in tree["added_tokens"] if token["id"] < self.tokens]
            own = {key: value for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
            return PreTrainedTokenizerFast(
                tokenizer_object=Tokenizer.from_str(json.dumps(tree)),
                chat_template=tokenizer.chat_template,
                clean_up_tokenization_spaces=False,
                **own,
            )

    def save_tokenizer(self, out: Path) -> bool:
        """Write the tokenizer, unless the file has none, and the generation config into `out`."""
        GenerationConfig.from_model_config(self.config).save_pretrained(out)
        if self.tokens:
            self.tokenizer().save_pretrained(out)
        return bool(self.tokens)

    def _process(self, gguf_name: str, weights: Any) -> Any:
        """Reorder a tensor as Hugging Face does: Llama's queries and keys are permuted, GPT-2's matrices transposed."""
        if gguf_name == "output.weight":
            return weights
        return self._processor.process(weights=weights, name=gguf_name).weights


@lru_cache(maxsize=2)
def _parsed(path: Path, size: int, changed: int) -> tuple[dict[str, Any], Any]:
    """Return transformers' config of a GGUF file and its reader, cached: parsing a file's tokens takes seconds."""
    from gguf import GGUFReader

    return load_gguf_checkpoint(str(path))["config"], GGUFReader(path)


def _config_fields(path: Path, kind: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return the config fields that transformers does not read; raises `ConfigError` for settings nobody applies."""
    architecture = str(values["general.architecture"])
    own = {name.removeprefix(f"{architecture}."): value for name, value in values.items()}
    odd = [
        f"{name}={value}"
        for name, value in values.items()
        if name.startswith(f"{architecture}.")
        and name.removeprefix(f"{architecture}.") not in APPLIED
        and value not in (0, False, "", "none")
    ]
    fields: dict[str, Any] = {}
    rope = own.get("rope.scaling.type", "none")
    if rope == "linear":
        theta = own.get("rope.freq_base", 10000.0)
        fields["rope_parameters"] = {"rope_type": rope, "factor": own["rope.scaling.factor"], "rope_theta": theta}
    elif rope != "none":
        odd.append(f"{architecture}.rope.scaling.type={rope}")
    size = own.get("rope.dimension_count", own["embedding_length"] // own["attention.head_count"])
    odd += [
        f"{name}={own[name]}"
        for name in ("attention.key_length", "attention.value_length")
        if own.get(name, size) != size
    ]
    if own.get("attention.sliding_window") and own["attention.sliding_window"] < own["context_length"]:
        odd.append(f"attention.sliding_window={own['attention.sliding_window']}")
    if own.get("attention.causal") is False:
        odd.append("attention.causal=False")
    if str(own.get("tensor_data_layout", "")).startswith("Meta"):
        odd.append(f"tensor_data_layout={own['tensor_data_layout']}")
    if values.get("split.count", 1) > 1:
        odd.append(f"split.count={values['split.count']} (merge the parts first: llama-gguf-split --merge)")
    fields |= FAMILIES[kind].gguf_fields(own)
    if odd:
        raise ConfigError(f"model={path} has {', '.join(odd)}, which finhpc does not apply; give another file.")
    return fields
