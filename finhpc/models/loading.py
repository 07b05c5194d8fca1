"""Open any model that finhpc reads: a folder, a hub id, a GGUF file, an adapter with its base."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from finhpc.errors import CheckpointError, ConfigError
from finhpc.models.families.registry import is_known, is_low_rank, skeleton
from finhpc.models.files.config import is_adapter, quantizer_of
from finhpc.models.files.manifest import check_manifest
from finhpc.models.files.source import config_of, locate, open_weights
from finhpc.models.files.tensor_folder import TensorFolder
from finhpc.models.files.tokens import generation_config
from finhpc.models.folder import model_of
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
    if is_adapter(path):
        return _load_adapted(path, dtype, device)
    if path.is_dir():
        check_manifest(path)
        generation_config(path)  # raises if it is damaged
    config = config_of(path, any_family=True)
    if quantizer_of(config) or not is_known(config):
        model = _load_with_transformers(path, config, dtype, device)
    else:
        weights = open_weights(path, low_rank=True, floats=True)
        _check_room(path, sum(p.numel() for p in weights.skeleton.parameters()) * dtype.itemsize, dtype, device)
        model = model_of(weights, dtype, device)
    return model


def _load_with_transformers(path: Path, config: Any, dtype: torch.dtype, device: str | torch.device) -> PreTrainedModel:
    """Open a quantized model, or one of a family that only transformers knows; every tensor of it is applied."""
    logging.disable_progress_bar()
    folder = TensorFolder(path, config)  # raises if files and index contradict each other
    sizes = {name: math.prod(shape) for name, shape in folder.shapes.items()}
    stored = sum(size * (1 if name in folder.quantized else dtype.itemsize) for name, size in sizes.items())
    _check_room(path, stored, dtype, device)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            device_map={"": str(device)},
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} holds a .safetensors file that is damaged or another format ({error}); pickles are never opened."
        ) from None
    kinds = {"missing_keys": "lacks", "unexpected_keys": "holds", "mismatched_keys": "has in another shape"}
    problems = [f"{path} {words} {name}; export it again." for key, words in kinds.items() for name in info[key]]
    if problems:
        raise CheckpointError("\n".join(problems[:20]))
    return model.eval()  # type: ignore[no-any-return]


def _check_room(path: Path, needed: int, dtype: torch.dtype, device: str | torch.device) -> None:
    """Raise `ConfigError` if the weights alone need more bytes than the GPU has free."""
    if torch.device(device).type != "cuda":
        return
    torch.cuda.empty_cache()  # of a model that was open before
    free, total = torch.cuda.mem_get_info(device)
    if needed > free:
        raise ConfigError(
            f"model={path} needs {needed / 1e9:,.1f} GB in {str(dtype).removeprefix('torch.')}, and the GPU has "
            f"{free / 1e9:,.1f} GB free of {total / 1e9:,.1f}; finhpc opens a model on one GPU: use fewer bits (finhpc "
            "export --quantization.bits 4), a larger GPU, or the CPU."
        )


def _load_adapted(path: Path, dtype: torch.dtype, device: str | torch.device) -> PreTrainedModel:
    base = base_of(path)
    check_base(path, base)
    model = load_model(base, dtype, device)
    adapter = load_adapter(path, skeleton(model.config))
    if quantizer_of(model.config) or is_low_rank(model.config):
        attach(model, {path.name: adapter}).select([path.name])
    else:
        merge_adapter(model, adapter)
    return model
