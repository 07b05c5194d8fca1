"""The adapters of a generation, by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finhpc.errors import ConfigError
from finhpc.models.families.registry import skeleton
from finhpc.models.files.config import is_adapter, quantizer_of
from finhpc.models.lora.adapter_file import base_of, check_base, load_adapter
from finhpc.models.lora.peft_format import Adapter
from finhpc.settings.generate import GenerateConfig


def parse_adapter(entry: str) -> tuple[str, Path]:
    """Return name and folder of an entry of `adapters`: NAME=FOLDER, or FOLDER, named by its last part."""
    name, equals, rest = entry.partition("=")
    path = Path(rest if equals else entry).expanduser()
    return (name if equals else path.name), path


def resolve_adapter_model(config: GenerateConfig) -> GenerateConfig:
    """If `model` is an adapter's folder, use its base as model and the adapter for prompts that name no other.

    Raises `ConfigError` if the adapter's base does not exist.
    """
    folder = Path(config.model).expanduser()
    if not config.model or not is_adapter(folder):
        return config
    name = folder.name.replace("=", "-")
    more = {"model": str(base_of(folder)), "adapters": [f"{name}={folder}", *config.adapters]}
    return config.model_copy(update=more | {"adapter": config.adapter or name})


def read_adapters(entries: Sequence[str], config: Any, folder: Path) -> dict[str, Adapter]:
    """Read the adapters of entries NAME=FOLDER for the model in `folder` with that `config`, by name.

    Raises `ConfigError` with every one that cannot be used, `CheckpointError` if a file is damaged.
    """
    base = skeleton(config)
    adapters: dict[str, Adapter] = {}
    problems: list[str] = []
    for entry in entries:
        name, path = parse_adapter(entry)
        if name in adapters:
            problems.append(f"adapters names {name} twice; give each a name of its own, as NAME=FOLDER.")
            continue
        try:
            adapters[name] = load_adapter(path, base)
            check_base(path, folder)
        except ConfigError as error:
            problems += error.problems
    bases = sorted({(adapter.bits, adapter.scheme) for adapter in adapters.values()})
    if len(bases) > 1 and not quantizer_of(config):
        kinds = " and ".join(f"{bits} bits {scheme}".strip() for bits, scheme in bases)
        problems.append(
            f"adapters were trained with bases of {kinds}, but a run has one base; generate in several runs."
        )
    if problems:
        raise ConfigError(problems)
    return adapters
