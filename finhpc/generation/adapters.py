"""The adapters that a generation is given, by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finhpc.errors import ConfigError
from finhpc.models.families.registry import whole_layers
from finhpc.models.files.config import is_adapter, quantizer_of
from finhpc.models.lora.adapter_file import base_of, check_base, load_adapter
from finhpc.models.lora.peft_format import Adapter
from finhpc.settings.generate import GenerateConfig


def named(entry: str) -> tuple[str, Path]:
    """Name and folder of an entry of `adapters`: NAME=FOLDER, or FOLDER, named by its last part."""
    name, equals, rest = entry.partition("=")
    path = Path(rest if equals else entry).expanduser()
    return (name if equals else path.name), path


def over_its_base(config: GenerateConfig) -> GenerateConfig:
    """The same generation where `model` is the folder of an adapter: over its base, for prompts that name no other.

    Raises `ConfigError` if the adapter's base is not there.
    """
    folder = Path(config.model).expanduser()
    if not config.model or not is_adapter(folder):
        return config
    name = folder.name.replace("=", "-")
    more = {"model": str(base_of(folder)), "adapters": [f"{name}={folder}", *config.adapters]}
    return config.model_copy(update=more | {"adapter": config.adapter or name})


def read_adapters(given: Sequence[str], config: Any, folder: Path) -> dict[str, Adapter]:
    """NAME=FOLDER (or FOLDER, named by its last part) -> adapters that fit the model in `folder`, of that `config`.

    Raises `ConfigError` with every one that cannot be used, `CheckpointError` where a file is damaged.
    """
    base = whole_layers(config)
    found: dict[str, Adapter] = {}
    problems: list[str] = []
    for entry in given:
        name, path = named(entry)
        if name in found:
            problems.append(f"adapters names {name} twice; give each a name of its own, as NAME=FOLDER.")
            continue
        try:
            found[name] = load_adapter(path, base)
            check_base(path, folder)
        except ConfigError as error:
            problems += error.problems
    bases = sorted({(adapter.bits, adapter.scheme) for adapter in found.values()})
    if len(bases) > 1 and not quantizer_of(config):
        kinds = " and ".join(f"{bits} bits {scheme}".strip() for bits, scheme in bases)
        problems.append(f"adapters were trained with bases of {kinds}, and here is one base; generate in several runs.")
    if problems:
        raise ConfigError(problems)
    return found
