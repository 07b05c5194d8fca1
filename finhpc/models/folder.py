"""The folder of a model that finhpc trains, dense or low-rank and in floats: open it, write it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging

from finhpc.errors import CheckpointError
from finhpc.models.families.registry import family_of, is_low_rank, skeleton
from finhpc.models.files.manifest import check_manifest
from finhpc.models.files.tensor_folder import TensorFolderWriter
from finhpc.models.files.tokenizer import save_tokenizer
from finhpc.models.files.tokens import GENERATION
from finhpc.models.files.weights import Weights, open_folder
from finhpc.quantization.fake import TRAINED, round_weights, trained_bits


@dataclass(frozen=True)
class _Unread:
    """A weight that is read when transformers takes it, like a slice of a safetensors file."""

    weights: Weights
    name: str

    def __getitem__(self, everything: object) -> Tensor:
        return self.weights.raw(self.name)


def open_model(folder: Path, device: str | torch.device = "cpu") -> PreTrainedModel:
    """Open a model of a supported family in eval mode on `device`; see `finhpc.load_model` for every other kind."""
    check_manifest(folder)
    return model_of(open_folder(folder, low_rank=True, floats=True), torch.float32, device)


def model_of(weights: Weights, dtype: torch.dtype, device: str | torch.device = "cpu") -> PreTrainedModel:
    """Build transformers' model of weights that match its own exactly, in eval mode on `device`.

    Each weight is read as it is needed, so host memory has no more than some weights of a model for a GPU.

    A model that was trained with rounded weights gets those, as floats.
    """
    logging.disable_progress_bar()  # reading one file needs no bar on the user's screen
    state: dict[str, Any] = {name: _Unread(weights, name) for name, _ in weights.skeleton.named_parameters()}
    family = family_of(weights.config)
    kind = family.low_rank_class if is_low_rank(weights.config) else family.dense_class
    model: PreTrainedModel = kind.from_pretrained(
        None, config=weights.config, state_dict=state, dtype=dtype, device_map={"": str(device)}
    )
    model.config._name_or_path = str(weights.path)
    if (weights.path / GENERATION).is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(weights.path)
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"{weights.path / GENERATION} cannot be read ({error}); restore it, or remove it to do without."
            ) from None
    if (bits := trained_bits(model.config)) < 16:
        round_weights(model, bits)
        delattr(model.config, TRAINED)
    return model.eval()


def save_model(folder: Path, hf_config: Any, tensors: Iterable[tuple[str, Tensor]], tokenizer: Path | None) -> None:
    """Write config.json, safetensors and the tokenizer's files; the folder appears when complete.

    `tensors`: Hugging Face name and tensor of each parameter, of which about a gigabyte is in memory at a time.
    `tokenizer`: a folder whose tokenizer and generation config are copied.
    """
    with TensorFolderWriter(folder, over=True) as writer:
        for name, tensor in tensors:
            writer.add({name: tensor})
        hf_config.architectures = [type(skeleton(hf_config)).__name__]
        hf_config.dtype = "float32"
        writer.finish(hf_config)
        if tokenizer is not None:
            save_tokenizer(tokenizer, writer.partial)
        writer.publish()
