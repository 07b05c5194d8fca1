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
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import logging

from finhpc.errors import CheckpointError
from finhpc.files import publish
from finhpc.models.families.registry import family_of, is_known, is_low_rank, skeleton, whole_layers
from finhpc.models.files.config import is_adapter, quantizer_of
from finhpc.models.files.manifest import check_manifest
from finhpc.models.files.tensor_folder import GENERATION, SafetensorsFolder
from finhpc.models.files.tokenizer import save_tokenizer
from finhpc.models.files.tokens import generation_config
from finhpc.models.files.weights import Weights, config_of, locate, open_weights
from finhpc.models.initialize import initialize
from finhpc.models.lora.adapter_file import base_of, check_base, load_adapter
from finhpc.models.lora.multi_lora import attach
from finhpc.models.lora.peft_format import merge_adapter
from finhpc.models.pipeline import parts_of
from finhpc.quantization.fake import TRAINED, round_weights, trained_bits


def load_model(
    path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """Open a model folder that finhpc or transformers wrote, a hub id or a .gguf file, in eval mode, on `device`.

    The folder of an adapter opens as its base with the adapter, which is added to the weights of a dense base in
    floats and stays on its own beside those of a low-rank or quantized one. A model that was trained with quantized
    weights gets the weights it was trained with, as floats. Weights are read from safetensors and GGUF files only.
    Raises `CheckpointError` when the folder is not a model, or its weights are not as its manifest and config say,
    `ConfigError` for a model or an adapter that asks for what is not computed.
    """
    path = locate(str(path))
    if is_adapter(path):
        return _with_adapter(path, dtype, device)
    if path.is_dir():
        check_manifest(path)
        generation_config(path)  # raises if it is damaged
    logging.disable_progress_bar()  # reading one file needs no bar on the user's screen
    config = config_of(path, any_family=True)
    if quantizer_of(config) or not is_known(config):
        model = _by_transformers(path, config, dtype, device)
    else:
        model = _in_floats(open_weights(path, low_rank=True, floats=True), dtype)
    if (bits := trained_bits(model.config)) < 16:
        round_weights(model, bits)
        delattr(model.config, TRAINED)
    return on_device(model.eval(), device)


def _in_floats(weights: Weights, dtype: torch.dtype) -> PreTrainedModel:
    """transformers' model of weights that were found to be exactly its own."""
    state = {name: weights.raw(name) for name, _ in weights.skeleton.named_parameters()}
    family = family_of(weights.config)
    kind = family.low_rank_class if is_low_rank(weights.config) else family.dense_class
    model: PreTrainedModel = kind.from_pretrained(None, config=weights.config, state_dict=state, dtype=dtype)
    model.config._name_or_path = str(weights.path)
    if (weights.path / GENERATION).is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(weights.path)
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"{weights.path / GENERATION} cannot be read ({error}); restore it, or remove it to do without."
            ) from None
    return model


def _by_transformers(path: Path, config: Any, dtype: torch.dtype, device: str | torch.device) -> PreTrainedModel:
    """A quantized model, or one of a family that transformers alone knows; every tensor of it is applied."""
    SafetensorsFolder(path, config)  # raises where files and index contradict each other
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True,
            **placed(config, device),
        )  # fmt: skip
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} holds a .safetensors file that is damaged or another format ({error}); pickles are never opened."
        ) from None
    kinds = {"missing_keys": "lacks", "unexpected_keys": "holds", "mismatched_keys": "has in another shape"}
    problems = [f"{path} {words} {name}; export it again." for key, words in kinds.items() for name in info[key]]
    if problems:
        raise CheckpointError("\n".join(problems[:20]))
    return model  # type: ignore[no-any-return]


def placed(config: Any, device: str | torch.device) -> dict[str, Any]:
    """How transformers is told to open bitsandbytes' models on `device`: it takes a GPU unasked, and int8 cannot move.

    Empty for all others, which `on_device` moves.
    """
    return {"device_map": {"": str(device)}} if quantizer_of(config) == "bitsandbytes" else {}


def on_device(model: PreTrainedModel, device: str | torch.device) -> PreTrainedModel:
    """The model on a device; where it is there already nothing is touched."""
    at = torch.device(device)
    there = model.device.type == at.type and at.index in (None, model.device.index)
    return model if there else model.to(at)  # type: ignore[arg-type]


def _with_adapter(path: Path, dtype: torch.dtype, device: str | torch.device) -> PreTrainedModel:
    base = base_of(path)
    check_base(path, base)
    model = load_model(base, dtype, device)
    adapter = load_adapter(path, whole_layers(model.config))
    if quantizer_of(model.config) or is_low_rank(model.config):
        attach(model, {path.name: adapter}).choose([path.name])
    else:
        merge_adapter(model, adapter)
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
    """Write config.json, safetensors (one file a shard) and the tokenizer's files; complete or absent.

    `tokenizer`: a folder with a tokenizer, and perhaps a generation config, which goes along.
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
        save_tokenizer(tokenizer, partial)
    publish(partial, folder, over=True)
