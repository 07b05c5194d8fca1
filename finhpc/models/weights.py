"""A model whose weights are read one at a time, so that memory is a layer and not a model.

From a Hugging Face folder (safetensors, one file or an index of several), a hub id, or a GGUF file.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from finhpc.errors import CheckpointError, ConfigError
from finhpc.lowrank.replace import dense_shape, layer_kind
from finhpc.models.families import family_of, is_low_rank, skeleton
from finhpc.models.gguf import GgufFile
from finhpc.models.pipeline import is_tied

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja",
)  # fmt: skip
# What older checkpoints hold beside weights: causal masks and rotary frequencies.
BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


class Store(Protocol):
    """Where tensors lie: their shapes, and each when asked for."""

    config: Any
    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str) -> Tensor: ...


@dataclass(frozen=True)
class Linear:
    """A linear layer or embedding of a dense model, by its Hugging Face name."""

    name: str
    kind: str
    out_features: int
    in_features: int
    transposed: bool  # stored as (in, out)

    @property
    def size(self) -> int:
        return self.out_features * self.in_features


class Weights:
    """A model of a supported family, dense or low-rank, its weights on disk.

    `path`: the folder or file. `config`: transformers' config. `tied`: one matrix is embedding and head.
    """

    def __init__(self, path: Path, store: Store) -> None:
        self.path, self.config, self._store = path, store.config, store
        if getattr(self.config, "quantization_config", None) is not None:
            raise ConfigError(f"model={path} is quantised; give the model it was made from.")
        family_of(self.config)
        self.tied = is_tied(self.config)
        self.skeleton = skeleton(self.config)
        self._stored = self._match()

    def read(self, name: str) -> Tensor:
        """The tensor of that Hugging Face name, as the model holds it, in float32.

        Raises `CheckpointError` where it holds NaN or infinity.
        """
        tensor = self._store.read(self._stored[name]).float()
        if not _finite(tensor):
            raise CheckpointError(f"{self.path}: {name} holds NaN or infinity; mend the model.")
        return tensor

    def matrix(self, layer: Linear) -> Tensor:
        """A layer's weight as (out, in), in float32; it lies in memory as it is stored."""
        weight = self.read(f"{layer.name}.weight")
        return weight.T if layer.transposed else weight

    def linears(self) -> list[Linear]:
        """Every linear layer and embedding that has a kind, in the order data flows through them."""
        found = []
        for name, module in self.skeleton.named_modules():
            shape, kind = dense_shape(module), layer_kind(name)
            if shape is not None and kind is not None:
                transposed = isinstance(module, Conv1D | nn.Embedding)
                found.append(Linear(name, kind, *shape, transposed))
        return found

    def save_tokenizer(self, folder: Path) -> bool:
        """Write the tokeniser's files into a folder; False where the model comes without."""
        if self.path.is_file():
            tokenizer = AutoTokenizer.from_pretrained(self.path.parent, gguf_file=self.path.name)
            tokenizer.save_pretrained(folder)
            return True
        files = [self.path / name for name in (*TOKENIZER_FILES, "generation_config.json")]
        for file in files:
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
        return any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer.model"))

    def _match(self) -> dict[str, str]:
        """Hugging Face name -> stored name of every weight; raises `CheckpointError` with every misfit."""
        state = self.skeleton.state_dict()
        shapes = self._store.shapes
        prefix = getattr(self.skeleton, "base_model_prefix", "") + "."
        names, problems = {}, []
        for name, tensor in state.items():
            # A checkpoint of the bare transformer leaves its prefix out; a tied head need not be stored.
            embedding = _embedding(state) if self.tied and name == "lm_head.weight" else name
            options = [name, name.removeprefix(prefix), embedding, embedding.removeprefix(prefix)]
            stored = next((option for option in options if option in shapes), None)
            if stored is None:
                problems.append(f"{self.path} holds no {name}; it is no whole {self.config.model_type} model.")
            elif shapes[stored] != tuple(tensor.shape):
                held, wanted = (" x ".join(map(str, shape)) for shape in (shapes[stored], tensor.shape))
                problems.append(f"{self.path}: {stored} is {held}, but its config says {wanted}; one of them is wrong.")
            else:
                names[name] = stored
        known = {*names.values(), "lm_head.weight"}
        extra = [name for name in shapes if name not in known and not name.endswith(BUFFERS)]
        if not problems:
            problems = [f"{self.path} holds {name}, which no {self.config.model_type} model has." for name in extra]
        if problems:
            shown = problems[:20] + ([f"... and {len(problems) - 20} more."] if len(problems) > 20 else [])
            raise CheckpointError("\n".join(shown))
        return names


class SafetensorsFolder:
    """The safetensors of a Hugging Face folder. A file is open only while one tensor is read from it."""

    def __init__(self, folder: Path) -> None:
        self.config: Any = read_config(folder)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, Path] = {}
        for file in _files(folder):
            with _open(file) as opened:
                for name in opened.keys():  # noqa: SIM118 - no dictionary
                    self.shapes[name] = tuple(opened.get_slice(name).get_shape())
                    self._files[name] = file

    def read(self, name: str) -> Tensor:
        with _open(self._files[name]) as opened:
            # A copy: the mapped pages would count as this process's memory as long as the tensor lives.
            tensor: Tensor = opened.get_tensor(name).clone()
        if not tensor.is_floating_point():
            raise CheckpointError(
                f"{self._files[name]}: {name} is {tensor.dtype}, so the model is quantised; "
                "give the model it was made from."
            )
        return tensor


def read_config(folder: Path) -> Any:
    """transformers' config of a model folder; raises `CheckpointError` where there is none."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json; give a model folder in Hugging Face's layout.")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise CheckpointError(f"{folder}/config.json is not a model's config: {reason}; correct it.") from None


FETCHED = ["*.json", "*.safetensors", *TOKENIZER_FILES]
# The same weights once more in their maker's own layout, as Mistral's and Meta's folders have them.
NOT_FETCHED = ["consolidated*", "original/*"]


def locate(model: str) -> Path:
    """The folder or file of `model`, fetched from the hub where it is a hub id.

    Raises `ConfigError` where there is no such thing, `CheckpointError` where the hub does not answer.
    """
    if not model:
        raise ConfigError("model is not set; give --model with a Hugging Face folder, a hub id or a .gguf file.")
    path = Path(model).expanduser()
    if path.exists():
        return path.absolute()
    if not HUB_ID.fullmatch(model) or model.endswith((".gguf", ".safetensors")):
        raise ConfigError(f"model={model} does not exist; give a Hugging Face folder, a hub id or a .gguf file.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=FETCHED, ignore_patterns=NOT_FETCHED))
    except Exception as error:  # the hub's client raises many kinds, some of other packages
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise CheckpointError(
            f"model={model} is nothing on this machine, and the hub did not give it ({reason}); "
            "check the name and the connection, or give a folder."
        ) from None


def open_weights(path: Path, low_rank: bool = False) -> Weights:
    """Open a located model, dense or, where that is wanted, `low_rank`.

    Raises `ConfigError` or `CheckpointError` where it cannot be used.
    """
    if path.is_dir():
        store = SafetensorsFolder(path)
        if is_low_rank(store.config) and not low_rank:
            raise ConfigError(f"model={path} is low-rank already; give a dense model.")
        return Weights(path, store)
    if path.suffix == ".gguf":
        return Weights(path, GgufFile(path))
    raise ConfigError(f"model={path} is a file that is no .gguf; give a Hugging Face folder or a .gguf file.")


@lru_cache(maxsize=1)
def opened(path: Path, stamp: str) -> Weights:
    """The same, kept open between the tasks of one process; `stamp` changes with the files."""
    return open_weights(path)


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise CheckpointError(f"{folder} lacks {', '.join(absent)}, which its index names; fetch them.")
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if list(folder.glob("*.bin")) or list(folder.glob("*.pt")) or list(folder.glob("*.pth")):
        raise CheckpointError(
            f"{folder} holds no .safetensors file; pickled weights are not opened; convert them first."
        )
    raise CheckpointError(f"{folder} holds no model.safetensors and no index of several; give a model folder.")


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise CheckpointError(
            f"{file} is cut short, damaged or another format ({error}); fetch or write it again; "
            "pickles are never opened."
        ) from None


def _finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite. The sum tells in a twentieth of the time, unless it overflows."""
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def _embedding(state: dict[str, Tensor]) -> str:
    return next(name for name in state if name in ("transformer.wte.weight", "model.embed_tokens.weight"))
