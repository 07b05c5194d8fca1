"""Sources of text: they are divided into units of work, and a unit is read document by document."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from finhpc.data.text import docs, formats
from finhpc.data.text.formats import Faults, Kind, Unit
from finhpc.errors import ConfigError
from finhpc.settings.prepare import PrepareConfig

KINDS: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".jsonl.gz": "jsonl",
    ".jsonl.zst": "jsonl",
    ".json.gz": "jsonl",
    ".json.zst": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
    ".tar": "archive",
    ".tar.xz": "archive",
    "_data.xz": "archive",
}
READERS: dict[Kind, Callable[[Unit, PrepareConfig, Faults], Iterator[str]]] = {
    "jsonl": formats.read_jsonl,
    "parquet": formats.read_parquet,
    "text": formats.read_text,
    "archive": formats.read_archive,
    "hf": formats.read_hf,
    "docs": docs.read_docs,
}


def read(unit: Unit, config: PrepareConfig, faults: Faults) -> Iterator[str]:
    """Yield the texts of a unit's documents, in order.

    Raises `DataError` naming file and line for a record without text, unless `faults` counts it, and for a damaged
    file.
    """
    return READERS[unit.kind](unit, config, faults)


def units(config: PrepareConfig) -> tuple[list[Unit], list[dict[str, Any]]]:
    """Divide all sources into units of work, in a fixed order, and describe each source for the manifest.

    Raises one `ConfigError` with every source that is missing, empty or of an unknown kind.
    """
    if not config.source:
        raise ConfigError("source is not set; give --source with a file, a folder, hf:NAME or docs.")
    units: list[Unit] = []
    described: list[dict[str, Any]] = []
    problems: list[str] = []
    for source in config.source:
        try:
            pieces, description = _source_units(source, config)
        except ConfigError as error:
            problems += error.problems
            continue
        units += pieces
        described.append({"source": source, **description})
    if problems:
        raise ConfigError(problems)
    return units, described


def _source_units(source: str, config: PrepareConfig) -> tuple[list[Unit], dict[str, Any]]:
    if source == "docs":
        return docs.docs_units()
    if source.startswith("hf:"):
        shards = list(formats.hf_units(source, config))
        return shards, {"split": config.hf_split, "shards": len(shards)}
    files, ignored = _files(Path(source).expanduser())
    pieces: list[Unit] = []
    for path in files:
        match _kind(path):
            case "jsonl":
                pieces += formats.jsonl_units(path)
            case "parquet":
                pieces += formats.parquet_units(path, config)
            case "archive":
                pieces += formats.archive_units(path)
    pieces += formats.file_units("text", [path for path in files if _kind(path) == "text"], formats.UNIT_BYTES)
    description = {"files": len(files), "bytes": sum(path.stat().st_size for path in files)}
    return pieces, description | ({"ignored_files": ignored} if ignored else {})


def _files(source: Path) -> tuple[list[Path], int]:
    """Return the readable files of a source, sorted, and the number of other files in it."""
    endings = ", ".join(KINDS)
    if not source.exists():
        raise ConfigError(f"source={source} does not exist; give a file, a folder, hf:NAME or docs.")
    if source.is_file():
        if _kind(source) is None:
            raise ConfigError(f"source={source} has an unknown format; its name must end in one of: {endings}.")
        return [source.absolute()], 0
    seen = sorted(Path(folder, name) for folder, _, names in os.walk(source.absolute()) for name in names)
    seen = [
        path for path in seen if not any(part.startswith(".") for part in path.relative_to(source.absolute()).parts)
    ]
    known = [path for path in seen if _kind(path) is not None]
    if not known:
        content = f"only files of other formats, such as {seen[0].name}" if seen else "no files"
        raise ConfigError(f"source={source} contains {content}; names must end in one of: {endings}.")
    return known, len(seen) - len(known)


def _kind(path: Path) -> Kind | None:
    return next((kind for ending, kind in KINDS.items() if path.name.lower().endswith(ending)), None)
