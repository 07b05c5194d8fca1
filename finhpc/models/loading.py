"""Open any model that finhpc reads: a folder, a hub id, a GGUF file, an adapter with its base."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from finhpc.models.base import load_base
from finhpc.models.families.registry import is_low_rank, skeleton
from finhpc.models.files.config import is_adapter, quantizer_of
from finhpc.models.files.source import locate
from finhpc.models.lora.adapter_file import base_of, check_base, load_adapter
from finhpc.models.lora.multi_lora import attach
from finhpc.models.lora.peft_format import merge_adapter


def load_model(
    path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """Open a model folder of finhpc or transformers, a hub id or a .gguf file, in eval mode on `device`.

    An adapter's folder opens as its base with the adapter, which is merged into a dense base in floats and stays
    separate on a low-rank or quantized one. A model that was trained with quantized weights gets those weights, as
    floats. Only safetensors and GGUF files are read. Raises `CheckpointError` if the folder is not a model, or its
    weights differ from its manifest or config, `ConfigError` for a model or an adapter that finhpc does not compute, or
    that the GPU has no room for.
    """
    path = locate(str(path))
    return _load_adapted(path, dtype, device) if is_adapter(path) else load_base(path, dtype, device)


def _load_adapted(path: Path, dtype: torch.dtype, device: str | torch.device) -> PreTrainedModel:
    base = base_of(path)
    check_base(path, base)
    model = load_base(base, dtype, device)
    adapter = load_adapter(path, skeleton(model.config))
    if quantizer_of(model.config) or is_low_rank(model.config):
        attach(model, {path.name: adapter}).select([path.name])
    else:
        merge_adapter(model, adapter)
    return model
