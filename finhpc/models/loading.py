"""Open any model that finhpc reads: a folder, a hub id, a GGUF file, an adapter with its base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from finhpc.errors import CheckpointError
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
    weights differ from its manifest or config, `ConfigError` for a model or an adapter that finhpc does not compute.
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
        model = model_of(open_weights(path, low_rank=True, floats=True), dtype)
    return _to_device(model, device)


def _load_with_transformers(path: Path, config: Any, dtype: torch.dtype, device: str | torch.device) -> PreTrainedModel:
    """Open a quantized model, or one of a family that only transformers knows; every tensor of it is applied."""
    logging.disable_progress_bar()
    TensorFolder(path, config)  # raises if files and index contradict each other
    # transformers would put bitsandbytes' models on a GPU, from which int8 cannot move.
    place = {"device_map": {"": str(device)}} if quantizer_of(config) == "bitsandbytes" else {}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True, **place
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


def _to_device(model: PreTrainedModel, device: str | torch.device) -> PreTrainedModel:
    """Move the model, unless it is on that device already: int8 models cannot be moved."""
    target = torch.device(device)
    same = model.device.type == target.type and target.index in (None, model.device.index)
    return model if same else model.to(target)  # type: ignore[arg-type]


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
