"""Prompts from the settings or a file, each with the adapter it names."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from finhpc.config import GenerateConfig, nearest
from finhpc.errors import ConfigError


@dataclass(frozen=True)
class Prompt:
    text: str
    adapter: str | None  # None: the base alone


def read_prompts(config: GenerateConfig, adapters: list[str]) -> list[Prompt]:
    """What `config` asks for. Raises `ConfigError` with every line that cannot be used, and for an empty file."""
    if config.prompt is not None:
        found = [(config.prompt, config.adapter, "adapter")]
    else:
        found = _from_file(Path(str(config.prompts)).expanduser(), config.adapter)
    problems = [
        f"{where}: {adapter} is no adapter that is loaded; "
        + (nearest(adapter, adapters) if adapters else "give --adapters NAME=FOLDER.")
        for _, adapter, where in found
        if adapter is not None and adapter not in adapters
    ]
    if problems:
        raise ConfigError(problems[:20])
    return [Prompt(text, adapter) for text, adapter, _ in found]


def _from_file(path: Path, adapter: str | None) -> list[tuple[str, str | None, str]]:
    """(text, adapter, where it stands) of every prompt of a file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise ConfigError(f"prompts={path} does not exist; give a .jsonl or text file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompts={path} cannot be read ({error}); give a .jsonl or text file in UTF-8.") from None
    numbered = [(f"{path}:{i}", line) for i, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ConfigError(f"prompts={path} holds no prompt; write one a line.")
    if path.suffix != ".jsonl":
        return [(line, adapter, where) for where, line in numbered]
    found, problems = [], []
    for where, line in numbered:
        try:
            tree = json.loads(line)
            text, own = tree["prompt"], tree.get("adapter", adapter)
            if not isinstance(text, str) or not isinstance(own, str | None):
                raise TypeError
            found.append((text, own, where))
        except (ValueError, KeyError, TypeError, AttributeError):
            problems.append(f'{where} is no {{"prompt": "...", "adapter": "..."}}, the adapter may be left out.')
    if problems:
        raise ConfigError(problems[:20])
    return found
