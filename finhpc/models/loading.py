"""Model folders in Hugging Face's layout: open one, write one, start a new model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from finhpc.errors import CheckpointError
from finhpc.files import publish
from finhpc.models.adapter import CONFIG, base_of, check_base, load_adapter, merge_adapter
from finhpc.models.families import skeleton
from finhpc.models.initialize import initialize
from finhpc.models.manifest import check_manifest
from finhpc.models.pipeline import parts_of
from finhpc.quantization.fake import TRAINED, round_weights, trained_bits


def load_model(
    path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """Open a model folder that finhpc or transformers wrote: dense or low-rank, in eval mode, on `device`.

    The folder of an adapter opens as its base, not quantised, with the adapter added to its weights. A model
    that was trained with quantised weights gets the weights it was trained with, as floats.
    Weights are read from safetensors only. Raises `CheckpointError` when the folder is no model, or its
    weights are not as its manifest says.
    """
    path = Path(path)
    if (path / CONFIG).is_file():
        return _with_adapter(path, dtype, device)
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} has no config.json; give a model folder (a run's `model` folder).")
    if not list(path.glob("*.safetensors")):
        raise CheckpointError(f"{path} holds no .safetensors file; pickled weights are not opened; convert them first.")
    check_manifest(path)
    logging.disable_progress_bar()  # reading one file needs no bar on the user's screen
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, local_files_only=True, use_safetensors=True, **placed(path, device)
        )
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} holds a .safetensors file that is damaged or another format ({error}); pickles are never opened."
        ) from None
    if (bits := trained_bits(model.config)) < 16:
        round_weights(model, bits)
        delattr(model.config, TRAINED)
    return on_device(model.eval(), device)


def placed(path: str | Path, device: str | torch.device) -> dict[str, Any]:
    """How transformers is told to open bitsandbytes' models on `device`: it takes a GPU unasked, and int8 cannot move.

    Empty for all others, which `on_device` moves.
    """
    quantized = getattr(AutoConfig.from_pretrained(path), "quantization_config", None) or {}
    return {"device_map": {"": str(device)}} if quantized.get("quant_method") == "bitsandbytes" else {}


def on_device(model: PreTrainedModel, device: str | torch.device) -> PreTrainedModel:
    """The model on a device; where it is there already nothing is touched."""
    at = torch.device(device)
    there = model.device.type == at.type and at.index in (None, model.device.index)
    return model if there else model.to(at)  # type: ignore[arg-type]


def _with_adapter(path: Path, dtype: torch.dtype, device: str | torch.device) -> PreTrainedModel:
    base = base_of(path)
    check_base(path, base)
    model = load_model(base, dtype, device)
    merge_adapter(model, load_adapter(path, model))
    return model


def initial_model(hf_config: Any, seed: int, scheme: str | None) -> Any:
    """The whole model as training starts it, on the CPU: what every cut into stages starts from."""
    model: Any = skeleton(hf_config).to_empty(device="cpu")
    for part in parts_of(hf_config):
        for name, module in zip(part.names, part.modules(model), strict=True):
            initialize(module, name, hf_config, seed, scheme)
    model.tie_weights()
    if hasattr(model, "model") and hasattr(model.model, "rotary_emb"):  # a buffer, not a weight
        model.model.rotary_emb = type(model.model.rotary_emb)(hf_config)
    return model


def save_model(
    folder: Path, hf_config: Any, shards: Sequence[Callable[[], dict[str, Tensor]]], tokenizer: Path | None
) -> None:
    """Write config.json, safetensors (one file a shard) and the tokeniser's files; complete or absent.

    Each of `shards` returns Hugging Face name -> tensor and is called once, in turn, so the memory
    needed is one shard.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    index: dict[str, str] = {}
    total = 0
    for i, shard in enumerate(shards):
        tensors = shard()
        name = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(tensors, partial / name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, name)
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if len(shards) > 1:
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
        (partial / "model.safetensors.index.json").write_text(text)
    hf_config.architectures = [type(skeleton(hf_config)).__name__]
    hf_config.dtype = "float32"
    hf_config.save_pretrained(partial)
    if tokenizer is not None:
        for file in sorted(tokenizer.iterdir()):
            shutil.copyfile(file, partial / file.name)
    publish(partial, folder, over=True)
