"""Models to score: model folders, hub ids or .gguf files, alone or with an adapter."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finhpc.errors import ConfigError, collect
from finhpc.models.families.registry import skeleton
from finhpc.models.files.config import is_adapter
from finhpc.models.files.source import config_of, find_tokenizer, locate, tokenizer_of
from finhpc.models.files.tokenizer import has_tokenizer
from finhpc.models.files.tokens import check_rows
from finhpc.models.loading import load_model
from finhpc.models.lora.adapter_file import base_of, check_base, load_adapter
from finhpc.models.lora.multi_lora import attach


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
        """Return one hash of the sizes and modification times of all its files."""
        rows = [
            (path, file.name, (stat := file.stat()).st_size, stat.st_mtime_ns)
            for path in (self.path, self.adapter)
            if path
            for file in (sorted(Path(path).iterdir()) if Path(path).is_dir() else [Path(path)])
            if file.is_file() and file.name != "result.json"
        ]
        return hashlib.sha256(json.dumps([self.path, self.adapter, rows]).encode()).hexdigest()


def subjects(models: list[str], adapters: list[str]) -> list[Subject]:
    """Return models with their adapters. Raises one `ConfigError` with every problem."""
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
    resolved: list[tuple[str, str | None]] = []
    for model, adapter in pairs:
        with collect(problems):
            resolved.append(_resolved(model, None if adapter in ("none", "") else adapter))
    twice = sorted({pair for pair in resolved if resolved.count(pair) > 1}, key=str)
    problems += [f"model={model} with adapter={adapter} is given twice; once is enough." for model, adapter in twice]
    for path, over in dict.fromkeys(resolved):
        with collect(problems):
            _check_ids(path, over)
    if problems:
        raise ConfigError(problems)
    names = [_name(adapter or model) for model, adapter in resolved]
    unique = [name if names.count(name) == 1 else f"{name}-{names[:i].count(name) + 1}" for i, name in enumerate(names)]
    return [Subject(name, model, adapter) for name, (model, adapter) in zip(unique, resolved, strict=True)]


def _check_ids(model: str, adapter: str | None) -> None:
    """Raise `ConfigError` if the tokenizer of a folder, or of its adapter, has ids that the model does not."""
    for folder in (adapter, model):
        tokenizer = find_tokenizer(Path(folder)) if folder else None
        if tokenizer is not None:
            check_rows(tokenizer, config_of(Path(model), any_family=True).vocab_size, f"model={model}")
            return


def _name(path: str) -> str:
    """Return a run's name for its `model`, otherwise the folder's own."""
    parts = [part for part in Path(path).parts if part not in ("/", ".")] or [path]
    generic = ("model", "adapter")
    return parts[-2] if parts[-1] in generic and len(parts) > 1 else parts[-1]


def _resolved(model: str, adapter: str | None) -> tuple[str, str | None]:
    path = Path(model).expanduser()
    if adapter is None and is_adapter(path):
        adapter, path = str(path.absolute()), base_of(path)
    else:
        path = locate(model)
    if adapter is not None:
        adapter = str(Path(adapter).expanduser().absolute())
    config = config_of(path, any_family=True)
    if path.is_dir() and not has_tokenizer(path):
        raise ConfigError(
            f"model={path} has no tokenizer, which prompts need; copy tokenizer.json and "
            "tokenizer_config.json of the model it was made from there."
        )
    if adapter is not None:
        load_adapter(Path(adapter), skeleton(config))
        check_base(Path(adapter), path)
    return str(path), adapter


def load_for_evaluation(
    path: str, adapter: str | None = None, dtype: str = "auto", device: str = "cpu"
) -> tuple[nn.Module, Any]:
    """Return a model in eval mode on `device`, with its adapter if any, and its tokenizer.

    `dtype` auto: that of the folder's config.json, float32 if it has none. A model that is quantized only to be scored
    is exported first (`finhpc.commands.export`). Raises `ConfigError` for a folder or adapter that does not fit,
    `CheckpointError` for damaged weights.
    """
    base = Path(path)
    config = config_of(base, any_family=True)
    kind = (config.dtype or torch.float32) if dtype == "auto" else getattr(torch, dtype)
    tokenizer = tokenizer_of(Path(adapter) if adapter and has_tokenizer(Path(adapter)) else base)
    check_rows(tokenizer, config.vocab_size, f"model={path}")
    model = load_model(base, kind, device)
    if adapter:
        name = Path(adapter).name
        attach(model, {name: load_adapter(Path(adapter), skeleton(model.config))}).select([name])
    return model.eval(), tokenizer
