"""Open a model folder, write one, build a new model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import logging

from finhpc.errors import CheckpointError
from finhpc.models.families.registry import family_of, is_known, is_low_rank, skeleton
from finhpc.models.files.config import is_adapter, quantizer_of
from finhpc.models.files.manifest import check_manifest
from finhpc.models.files.tensor_folder import TensorFolder, TensorFolderWriter
from finhpc.models.files.tokenizer import save_tokenizer
from finhpc.models.files.tokens import GENERATION, generation_config
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
    logging.disable_progress_bar()  # reading one file needs no bar on the user's screen
    config = config_of(path, any_family=True)
    if quantizer_of(config) or not is_known(config):
        model = _load_with_transformers(path, config, dtype, device)
    else:
        model = _load_floats(open_weights(path, low_rank=True, floats=True), dtype)
    if (bits := trained_bits(model.config)) < 16:
        round_weights(model, bits)
        delattr(model.config, TRAINED)
    return _to_device(model.eval(), device)


def _load_floats(weights: Weights, dtype: torch.dtype) -> PreTrainedModel:
    """Build transformers' model of weights that match its own exactly."""
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


def _load_with_transformers(path: Path, config: Any, dtype: torch.dtype, device: str | torch.device) -> PreTrainedModel:
    """Open a quantized model, or one of a family that only transformers knows; every tensor of it is applied."""
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
    return model  # type: ignore[no-any-return]


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


def initial_model(hf_config: Any, seed: int, scheme: str | None) -> Any:
    """Build the whole model on the CPU with the weights that training starts from."""
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
    """Write config.json, safetensors (a file per shard) and the tokenizer's files; the folder appears when complete.

    `tokenizer`: a folder whose tokenizer and generation config are copied. Each of `shards` returns Hugging Face
    name -> tensor and is called once, in turn, so only one is in memory.
    """
    with TensorFolderWriter(folder, over=True) as writer:
        for shard in shards:
            writer.add(shard())
            writer.flush()
        hf_config.architectures = [type(skeleton(hf_config)).__name__]
        hf_config.dtype = "float32"
        writer.finish(hf_config)
        if tokenizer is not None:
            save_tokenizer(tokenizer, writer.partial)
        writer.publish()
