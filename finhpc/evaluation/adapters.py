"""The adapters that a generation is given, by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finhpc.errors import ConfigError
from finhpc.models.adapter import Adapter
from finhpc.models.adapter_file import check_base, load_adapter
from finhpc.models.config_file import quantizer_of
from finhpc.models.families import whole_layers


def named(entry: str) -> tuple[str, Path]:
    """Name and folder of an entry of `adapters`: NAME=FOLDER, or FOLDER, named by its last part."""
    name, equals, rest = entry.partition("=")
    path = Path(rest if equals else entry).expanduser()
    return (name if equals else path.name), path


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
