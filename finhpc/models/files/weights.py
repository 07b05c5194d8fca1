"""A model on disk whose weights are read one at a time, so that only one layer is in memory, never the whole model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from finhpc.errors import CheckpointError, ConfigError
from finhpc.lowrank.replace import dense_shape
from finhpc.models.families.registry import family_of, is_low_rank, skeleton
from finhpc.models.files.config import quantizer_of, read_config
from finhpc.models.files.tensor_folder import TensorFolder
from finhpc.models.files.tokens import generation_config
from finhpc.quantization.fake import TRAINED, is_transposed, trained_bits
from finhpc.quantization.per_vector import rounded

WRAPPERS = re.compile(r"(^|\.)(?:(?:module|_orig_mod|_fsdp_wrapped_module)\.)+")
# Causal masks and rotary frequencies, which older checkpoints have in addition to weights.
BUFFERS = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")
OLD_HEAD = re.compile(r"^embed_out\.")  # what GPT-NeoX's head is called in its checkpoints


class Store(Protocol):
    """Stored tensors: shapes, the types of those that are not floats, and a reader."""

    config: Any
    shapes: dict[str, tuple[int, ...]]
    quantized: dict[str, str]

    def read(self, name: str) -> Tensor: ...


@dataclass(frozen=True)
class Linear:
    """A linear layer or embedding of a dense model, by its Hugging Face name."""

    name: str
    kind: str
    out_features: int
    in_features: int
    transposed: bool  # stored as (in, out)
    projection: str | None = None

    @property
    def size(self) -> int:
        return self.out_features * self.in_features


class Weights:
    """A model of a supported family, dense or low-rank, its weights on disk.

    `path`: the folder or file. `config`: transformers' config. `tied`: one matrix is embedding and head. The weights of
    a model that was trained with rounded weights are rounded when read, and its config no longer records that; with
    `floats` they are read as stored.
    """

    def __init__(self, path: Path, store: Store, floats: bool = False) -> None:
        self.path, self.config, self._store = path, store.config, store
        if quantizer_of(self.config):
            raise ConfigError(f"model={path} is quantized already; give the model it was made from.")
        self.family = family_of(self.config)
        self._bits = 16 if floats else trained_bits(self.config)
        if self._bits < 16:
            delattr(self.config, TRAINED)
        self.tied = bool(self.config.tie_word_embeddings)
        self.skeleton = skeleton(self.config)
        self._stored = self._match()
        self._check_tie()

    def read(self, name: str) -> Tensor:
        """Read the tensor of that Hugging Face name in float32, as the model computes with it.

        Raises `CheckpointError` if it holds NaN or infinity.
        """
        # A copy: mapped pages would count as this process's memory as long as the tensor exists.
        tensor = self.raw(name).clone().float()
        if not _finite(tensor):
            raise CheckpointError(f"{self.path}: {name} holds NaN or infinity; repair the model.")
        if self._bits < 16 and tensor.dim() == 2:
            transposed = is_transposed(self.skeleton.get_submodule(name.rpartition(".")[0]))
            return rounded(tensor.T, self._bits).T if transposed else rounded(tensor, self._bits)
        return tensor

    def matrix(self, layer: Linear) -> Tensor:
        """Read a layer's weight as (out, in) in float32; a view of the stored layout."""
        weight = self.read(f"{layer.name}.weight")
        return weight.T if layer.transposed else weight

    def linears(self) -> list[Linear]:
        """Return every linear layer and embedding that has a kind, in forward order."""
        linears = []
        for name, module in self.skeleton.named_modules():
            shape, kind = dense_shape(module), self.family.layer_kind(name)
            if shape is not None and kind is not None:
                transposed = isinstance(module, Conv1D | nn.Embedding)
                linears.append(Linear(name, kind, *shape, transposed, self.family.projection(name)))
        return linears

    def raw(self, name: str) -> Tensor:
        """Read the tensor of that Hugging Face name as stored, unchecked."""
        return self._store.read(self._stored[name])

    def _match(self) -> dict[str, str]:
        """Return Hugging Face name -> stored name of every weight; raises `CheckpointError` with every misfit."""
        head, tied_to = f"{self.family.head}.weight", f"{self.family.embedding}.weight"
        shapes, plain = self._store.shapes, self._plain_names()
        prefix = getattr(self.skeleton, "base_model_prefix", "") + "."
        names, problems = {}, []
        for name, tensor in self.skeleton.state_dict().items():
            # A checkpoint of the bare transformer omits its prefix; a tied head need not be stored.
            embedding = tied_to if self.tied and name == head else name
            options = [name, name.removeprefix(prefix), embedding, embedding.removeprefix(prefix)]
            stored = next((plain[option] for option in options if option in plain), None)
            if stored is None:
                problems.append(f"{self.path} has no {name}; it is not a whole {self.config.model_type} model.")
            elif stored in self._store.quantized:
                kind = self._store.quantized[stored]
                problems.append(
                    f"{self.path}: {stored} is {kind}, so the model is quantized; give what it was made from."
                )
            elif shapes[stored] != tuple(tensor.shape):
                actual, wanted = (" x ".join(map(str, shape)) or "a scalar" for shape in (shapes[stored], tensor.shape))
                problems.append(f"{self.path}: {stored} is {actual}, but its config says {wanted}; one is wrong.")
            else:
                names[name] = stored
        used = set(names.values())
        extra = [name for name in shapes if name not in used and not name.endswith(BUFFERS)]
        if not problems:
            problems = [
                f"{self.path} holds {name}, which no {self.config.model_type} model has; save the plain language model."
                for name in extra
            ]
        if problems:
            shown = problems[:20] + ([f"... and {len(problems) - 20} more."] if len(problems) > 20 else [])
            raise CheckpointError("\n".join(shown))
        return names

    def _plain_names(self) -> dict[str, str]:
        """Return name -> stored name, without the prefixes that wrappers such as DDP and torch.compile add."""
        plain: dict[str, str] = {}
        for stored in self._store.shapes:
            name = OLD_HEAD.sub("lm_head.", WRAPPERS.sub(r"\1", stored))
            if name in plain:
                raise CheckpointError(f"{self.path} holds both {plain[name]} and {stored}; write the model again.")
            plain[name] = stored
        return plain

    def _check_tie(self) -> None:
        """Raise `CheckpointError` if a separate head contradicts a config that ties it to the embedding."""
        if not self.tied:
            return
        head, embedding = f"{self.family.head}.weight", f"{self.family.embedding}.weight"
        if self._stored[head] != self._stored[embedding] and not torch.equal(self.raw(head), self.raw(embedding)):
            raise CheckpointError(
                f"{self.path} holds {self._stored[head]}, which differs from its embedding, but its config has "
                "tie_word_embeddings=true; set it to false, or remove that weight."
            )


def open_folder(folder: Path, low_rank: bool = False, floats: bool = False) -> Weights:
    """Open a model folder, which must be dense unless `low_rank`; `floats`: see `Weights`.

    Raises `ConfigError` or `CheckpointError` if it cannot be used.
    """
    store = TensorFolder(folder, read_config(folder))
    generation_config(folder)  # copied with every model made from this one; raises if it is damaged
    if is_low_rank(store.config) and not low_rank:
        raise ConfigError(f"model={folder} is low-rank already; give a dense model.")
    return Weights(folder, store, floats)


def _finite(tensor: Tensor) -> bool:
    """Return whether no entry is NaN or infinite. The sum shows it in a twentieth of the time, unless it overflows."""
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())
