"""Models to score: any that transformers opens after `import finhpc`, alone or under a peft adapter."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import finhpc  # noqa: F401  transformers knows finhpc's models after it
from finhpc.errors import CheckpointError, ConfigError
from finhpc.models.adapter import QUANTIZED, check_base, load_adapter, merge_adapter
from finhpc.models.families import check_plugins
from finhpc.models.loading import load_model, on_device, placed

ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class Subject:
    """A model to score: `path` a folder or hub id, `adapter` a folder or None; `name` is unique among them."""

    name: str
    path: str
    adapter: str | None

    @property
    def made_by(self) -> Path | None:
        """The run folder that made it, or None."""
        for path in (self.adapter, self.path):
            folder = Path(path).absolute().parent if path else None
            if folder is not None and (folder / "mlflow.json").is_file():
                return folder
        return None

    def stamp(self) -> str:
        """One hash of the sizes and times of change of all its files; changes when one does."""
        rows = [
            (path, file.name, (stat := file.stat()).st_size, stat.st_mtime_ns)
            for path in (self.path, self.adapter)
            if path and Path(path).is_dir()
            for file in sorted(Path(path).iterdir())
            if file.is_file() and file.name != "result.json"
        ]
        return hashlib.sha256(json.dumps([self.path, self.adapter, rows]).encode()).hexdigest()


def subjects(models: list[str], adapters: list[str]) -> list[Subject]:
    """Models and adapters as they belong together; raises `ConfigError` with every problem."""
    if not models:
        raise ConfigError("model is not set; give --model with a model folder (a run's `model` folder) or a hub id.")
    if adapters and len(models) > 1 and len(adapters) != len(models):
        raise ConfigError(
            f"{len(adapters)} adapters do not fit {len(models)} models; give one model, or one adapter a model (none: "
            "without)."
        )
    if len(models) == 1 and adapters:
        pairs = [(models[0], adapter) for adapter in adapters]
    else:
        pairs = list(zip(models, adapters or ["none"] * len(models), strict=True))
    problems: list[str] = []
    found: list[tuple[str, str | None]] = []
    for model, adapter in pairs:
        try:
            found.append(_resolved(model, None if adapter in ("none", "") else adapter))
        except ConfigError as error:
            problems += error.problems
    twice = sorted({pair for pair in found if found.count(pair) > 1}, key=str)
    problems += [f"model={model} with adapter={adapter} is given twice; once is enough." for model, adapter in twice]
    if problems:
        raise ConfigError(problems)
    names = [_name(adapter or model) for model, adapter in found]
    unique = [name if names.count(name) == 1 else f"{name}-{names[:i].count(name) + 1}" for i, name in enumerate(names)]
    return [Subject(name, model, adapter) for name, (model, adapter) in zip(unique, found, strict=True)]


def _name(path: str) -> str:
    """A run's name for its `model`, else the folder's own."""
    parts = [part for part in Path(path).parts if part not in ("/", ".")] or [path]
    generic = ("model", "adapter")
    return parts[-2] if parts[-1] in generic and len(parts) > 1 else parts[-1]


def _resolved(model: str, adapter: str | None) -> tuple[str, str | None]:
    folder = Path(model).expanduser()
    if adapter is None and (folder / ADAPTER).is_file():
        adapter, model = str(folder.absolute()), str(_adapter_config(folder).get("base_model_name_or_path") or "")
        if not model:
            raise ConfigError(f"model={folder} is an adapter that does not name its base; give --model BASE --adapter.")
        folder = Path(model).expanduser()
    if adapter is not None:
        if not (Path(adapter).expanduser() / ADAPTER).is_file():
            raise ConfigError(f"adapter={adapter} has no {ADAPTER}; give a folder that peft wrote.")
        adapter = str(Path(adapter).expanduser().absolute())
    if folder.exists():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"model={folder} has no config.json; give a model folder (a run's `model` folder).")
        if not any(folder.glob("tokenizer*")) and not any(folder.glob("vocab*")):
            raise ConfigError(
                f"model={folder} comes without a tokeniser, which prompts need; copy tokenizer.json and "
                "tokenizer_config.json of the model it was made from there."
            )
        check_plugins(folder)
        model = str(folder.absolute())
        if adapter is not None:
            check_base(Path(adapter), Path(model))
    elif folder.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise ConfigError(f"model={model} does not exist; give a model folder or a hub id.")
    return model, adapter


def load_for_evaluation(
    path: str, adapter: str | None = None, dtype: str = "auto", device: str = "cpu"
) -> tuple[nn.Module, Any]:
    """A model in eval mode on `device` and its tokeniser: dense, low-rank or quantised, with the adapter if given.

    `dtype` auto: that of the folder's config.json, float32 where it says none. A model quantised on the fly
    is exported first (`finhpc.models.export`). Raises `ConfigError` for a folder or adapter that does not fit,
    `CheckpointError` for damaged weights.
    """
    try:
        config = AutoConfig.from_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(adapter if adapter and _has_tokenizer(adapter) else path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model={path} cannot be opened ({_first(error)}); give a model folder or a hub id."
        ) from None
    of_config = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    kind = of_config if dtype == "auto" else getattr(torch, dtype)
    open_ = load_model if Path(path).is_dir() else _from_hub
    model = open_(path, kind, device)
    if adapter and (Path(adapter) / QUANTIZED).is_file():  # its base is rounded as it was in training
        merge_adapter(model, load_adapter(Path(adapter), model))
    elif adapter:
        return _adapted(model, path, adapter).eval(), tokenizer
    return model.eval(), tokenizer


def _from_hub(name: str, dtype: torch.dtype, device: str) -> Any:
    logging.disable_progress_bar()
    try:
        where = placed(name, device)
        return on_device(AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True, **where), device)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model={name} cannot be opened ({_first(error)}); check the id and the network.") from None


def _adapted(model: Any, path: str, adapter: str) -> nn.Module:
    """The model under a peft adapter; refused where the adapter was made for another base."""
    from peft import PeftConfig, get_peft_model
    from peft.utils import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

    said = _adapter_config(Path(adapter)).get("base_model_name_or_path")
    refused = f"adapter={adapter} was made for another base than model={path}"
    remedy = f"give its own base{f' ({said})' if said else ''}"
    try:
        adapted = get_peft_model(model, PeftConfig.from_pretrained(adapter))
        weights = load_peft_weights(adapter, device="cpu")
        shapes = {name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(adapted).items()}
    except (ValueError, OSError) as error:
        raise ConfigError(f"{refused}, or is damaged ({_first(error)}); {remedy}.") from None
    other = [name for name, tensor in weights.items() if shapes.get(name) != tuple(tensor.shape)]
    other += [name for name in shapes if name not in weights]
    if other:
        raise ConfigError(
            f"{refused}: {len(other)} of its {len(weights)} tensors do not fit, first {other[0]}; {remedy}."
        )
    set_peft_model_state_dict(adapted, weights)
    return adapted  # type: ignore[no-any-return]


def _adapter_config(folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / ADAPTER} cannot be read ({_first(error)}); restore it.") from None
    return found


def _has_tokenizer(folder: str) -> bool:
    return (Path(folder) / "tokenizer_config.json").is_file()


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
