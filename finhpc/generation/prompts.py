"""Read prompts from the settings or a file, each with its adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from finhpc.data.examples.values import text_of
from finhpc.errors import ConfigError
from finhpc.settings.base import nearest
from finhpc.settings.generate import GenerateConfig
from finhpc.textfile import parse_json, read_text

ENDINGS = ".jsonl or text (.txt)"
TABLES = (".json", ".csv", ".tsv", ".parquet", ".yaml", ".yml")  # their lines are not prompts


@dataclass(frozen=True)
class Prompt:
    text: str
    adapter: str | None  # None: only the base


def read_prompts(config: GenerateConfig, adapters: list[str]) -> list[Prompt]:
    """Return the prompts of `config`. Raises `ConfigError` with every unusable line, and for an empty file."""
    if config.prompt is not None:
        entries = [(config.prompt, config.adapter, "adapter")]
    else:
        entries = _from_file(Path(str(config.prompts)).expanduser(), config.adapter)
    problems = [
        f"{where}: adapter {adapter} is not loaded; "
        + (nearest(adapter, adapters) if adapters else "give --adapters NAME=FOLDER.")
        for _, adapter, where in entries
        if adapter is not None and adapter not in adapters
    ]
    if problems:
        raise ConfigError(problems[:20])
    return [Prompt(text, adapter) for text, adapter, _ in entries]


def _from_file(path: Path, adapter: str | None) -> list[tuple[str, str | None, str]]:
    """Return (text, adapter, place) of every prompt of a file."""
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise ConfigError(f"prompts={path} {kind}; give a .jsonl or text file.")
    ending = path.suffix.lower()
    if ending in TABLES:
        raise ConfigError(f"prompts={path} has an unsupported format; give {ENDINGS} with one prompt per line.")
    lines = read_text(path, setting=None)[0].split("\n")
    numbered = [(f"{path}:{i}", line) for i, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ConfigError(f"prompts={path} has no prompts; write one per line.")
    if ending not in (".jsonl", ".ndjson"):
        return [(line, adapter, where) for where, line in numbered]
    entries, problems = [], []
    for where, line in numbered:
        try:
            entries.append((*_fields(line, adapter, where), where))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems[:20])
    return entries


def _fields(line: str, adapter: str | None, where: str) -> tuple[str, str | None]:
    """Parse prompt and adapter of a JSON line."""
    try:
        tree = parse_json(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is broken JSON ({error}); correct the line.") from None
    if not isinstance(tree, dict) or "prompt" not in tree:
        raise ConfigError(f'{where} is not {{"prompt": "...", "adapter": "..."}}; the adapter is optional.')
    text = text_of(tree["prompt"], "prompt", where)
    if not text:
        raise ConfigError(f"{where}: the prompt is empty; write one or remove the line.")
    own = tree.get("adapter", adapter)
    return text, None if own is None else text_of(own, "adapter", where)
