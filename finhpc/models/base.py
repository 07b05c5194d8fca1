"""Open a model without adapters: a folder, a hub id, a GGUF file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from finhpc.errors import CheckpointError, ConfigError
from finhpc.models.families.registry import is_known
from finhpc.models.files.config import quantizer_of
from finhpc.models.files.manifest import check_manifest
from finhpc.models.files.source import config_of, locate, open_weights
from finhpc.models.files.tensor_folder import TensorFolder
from finhpc.models.files.tokens import generation_config
from finhpc.models.folder import model_of


def load_base(
    path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """Open what is not an adapter, as `finhpc.models.loading.load_model` does."""
    path = locate(str(path))
    if path.is_dir():
        check_manifest(path)
        generation_config(path)  # raises if it is damaged
    config = config_of(path, any_family=True)
    if quantizer_of(config) or not is_known(config):
        return _load_with_transformers(path, config, dtype, device)
    weights = open_weights(path, low_rank=True, floats=True)
    _check_room(path, sum(p.numel() for p in weights.skeleton.parameters()) * dtype.itemsize, dtype, device)
    return model_of(weights, dtype, device)


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
