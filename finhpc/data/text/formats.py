"""File formats of text: how files are divided into units of work, and how the texts of a unit are read.

`jsonl_units` and its like divide files; the readers yield texts one at a time, in file order, and name file and line
(or row) of what they cannot read.
"""

from __future__ import annotations

import io
import lzma
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, Literal

from finhpc.data.examples.tables import NOT_UTF8, column_values, first_line, open_parquet
from finhpc.data.examples.values import NotTextError, is_missing, plain_text, shown
from finhpc.errors import ConfigError, DataError
from finhpc.settings.prepare import PrepareConfig
from finhpc.textfile import UnreadableText, decode, parse_json

UNIT_BYTES = 4 << 20  # input per unit, about a second of work, so that small sources are divided evenly as well
FILES_PER_UNIT = 2000
COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
ARCHIVES = (".tar", ".tar.xz", ".xz")
Kind = Literal["jsonl", "parquet", "text", "archive", "hf", "docs"]


@dataclass(frozen=True)
class Unit:
    """The piece of a source that one task reads. `start` and `stop` count bytes or, of parquet, row groups."""

    kind: Kind
    paths: tuple[str, ...]
    start: int = 0
    stop: int = 0
    name: str = ""  # an archive's member; a hub data set's configuration
    size: int = 0  # bytes of input, for progress; 0: unknown

    def __str__(self) -> str:
        return f"{self.paths[0]}{f' ({self.name})' if self.name else ''}"


class Faults:
    """Raises an error at a broken record (`strict`), or counts it (`skip`)."""

    def __init__(self, on_error: str) -> None:
        self.strict = on_error == "strict"
        self.broken = 0

    def record(self, where: Callable[[int], str], number: int, problem: str, remedy: str) -> None:
        """Handle a record that cannot be used; `where` returns the place of a record by its number."""
        if self.strict:
            raise DataError(
                f"{where(number)}: {problem}; {remedy}, or count and skip such records with --on_error skip."
            )
        self.broken += 1


# JSON lines


def jsonl_units(path: Path) -> Iterator[Unit]:
    """Yield byte ranges of a plain file; a compressed file is one unit, because it can only be read from its start."""
    size = path.stat().st_size
    if path.suffix.lower() in COMPRESSION:
        yield Unit("jsonl", (str(path),), 0, size, size=size)
        return
    pieces = max(1, round(size / UNIT_BYTES))
    edges = [size * i // pieces for i in range(pieces + 1)]
    for start, stop in pairwise(edges):
        yield Unit("jsonl", (str(path),), start, stop, size=stop - start)


def read_jsonl(unit: Unit, config: PrepareConfig, faults: Faults) -> Iterator[str]:
    """Yield the texts of the lines that begin in [start, stop)."""

    def where(number: int) -> str:
        return f"{unit.paths[0]} line {_lines_before(unit) + number}"

    # Splitting again finds the lines of a file that ends them with \r alone, which JSON has nowhere else.
    for number, line in enumerate((part for read in _lines(unit) for part in read.splitlines()), 1):
        if not line or line.isspace():
            continue
        try:
            yield _text_of(line, config.text_field)
        except NotTextError as error:
            faults.record(where, number, error.holds, error.remedy)


def _lines(unit: Unit) -> Iterator[bytes]:
    path = unit.paths[0]
    if compression := COMPRESSION.get(Path(path).suffix.lower()):
        import pyarrow as pa

        with _whole(path), io.BufferedReader(pa.input_stream(path, compression=compression)) as file:
            yield from file
        return
    with open(path, "rb") as plain:
        position = _first_line(plain, unit.start)
        while position < unit.stop and (line := plain.readline()):
            position += len(line)
            yield line


def _first_line(file: IO[bytes], start: int) -> int:
    """Seek to the first line that begins at `start` or after it, and return its position."""
    if start == 0:
        return 0
    file.seek(start - 1)
    return start - 1 + len(file.readline())


def _lines_before(unit: Unit) -> int:
    """Count the lines of the file before the unit's first, for an error."""
    if unit.start == 0:
        return 0
    with open(unit.paths[0], "rb") as file:
        left, lines = _first_line(file, unit.start), 0
        file.seek(0)
        while left and (part := file.read(min(left, 1 << 20))):
            lines += part.count(b"\n")
            left -= len(part)
    return lines


def _text_of(line: bytes, field: str) -> str:
    """Return the text of a JSON line. Raises `NotTextError`."""
    try:
        record = parse_json(line.decode())
    except UnicodeDecodeError as error:
        raise NotTextError(f"not UTF-8 (byte {error.start + 1} of the line)", "convert the file to UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise NotTextError(f"broken JSON ({error})", "correct the line") from None
    if not isinstance(record, dict):
        raise NotTextError(f"a JSON {type(record).__name__}, not an object", f'write {{"{field}": "..."}}')
    if field not in record:
        texts = [name for name, value in record.items() if isinstance(value, str)]
        names = ", ".join(texts) or "(no field holds text)"
        raise NotTextError(f'no field "{field}"', f"use --text_field with one of: {names}")
    return _checked(record[field], field)


def _checked(value: Any, field: str) -> str:
    if value is NOT_UTF8:
        raise NotTextError("not UTF-8", "convert it")
    if is_missing(value):
        raise NotTextError(f'field "{field}" holds {shown(value)}, not text', "correct it")
    try:
        return plain_text(value)
    except NotTextError as error:
        raise NotTextError(f'field "{field}" holds {error.holds}', error.remedy) from None


# Parquet


def parquet_units(path: Path, config: PrepareConfig) -> Iterator[Unit]:
    """Yield runs of row groups."""
    with open_parquet(str(path)) as file:
        _check_column(path, file.schema_arrow, config.text_field)
        first, size = 0, 0
        groups = file.metadata.num_row_groups
        for group in range(groups):
            size += file.metadata.row_group(group).total_byte_size
            if size >= UNIT_BYTES or group == groups - 1:
                yield Unit("parquet", (str(path),), first, group + 1, size=size)
                first, size = group + 1, 0


def read_parquet(unit: Unit, config: PrepareConfig, faults: Faults) -> Iterator[str]:
    def where(number: int) -> str:
        return f"{unit.paths[0]} row {number}"

    field = config.text_field
    with open_parquet(unit.paths[0]) as file:
        row = sum(file.metadata.row_group(group).num_rows for group in range(unit.start))
        groups = list(range(unit.start, unit.stop))
        for batch in file.iter_batches(batch_size=512, row_groups=groups, columns=[field], use_threads=False):
            for value in column_values(batch.column(0)):
                row += 1
                try:
                    yield _checked(value, field)
                except NotTextError as error:
                    faults.record(where, row, error.holds, error.remedy)


def _check_column(path: Path, schema: Any, field: str) -> None:
    import pyarrow as pa

    def holds_text(kind: Any) -> bool:
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))

    texts = ", ".join(column.name for column in schema if holds_text(column.type)) or "(no column holds text)"
    if field not in schema.names:
        raise DataError(f'{path}: no column "{field}"; use --text_field with one of: {texts}.')
    if not holds_text(schema.field(field).type):
        kind = schema.field(field).type
        raise DataError(f'{path}: column "{field}" holds {kind}, not text; use --text_field with one of: {texts}.')


# Text files, one document each


def text_units(paths: list[Path]) -> Iterator[Unit]:
    """Yield groups of files."""
    group: list[str] = []
    size = 0
    for path in paths:
        group.append(str(path))
        size += path.stat().st_size
        if size >= UNIT_BYTES or len(group) == FILES_PER_UNIT:
            yield Unit("text", tuple(group), size=size)
            group, size = [], 0
    if group:
        yield Unit("text", tuple(group), size=size)


def read_text(unit: Unit, config: PrepareConfig, faults: Faults) -> Iterator[str]:
    for path in unit.paths:
        yield from _document(Path(path).read_bytes(), path, faults)


def _document(content: bytes, where: str, faults: Faults) -> Iterator[str]:
    try:
        yield decode(content)[0]
    except UnreadableText as error:
        faults.record(lambda line: f"{where} line {line}" if line else where, error.line, error.problem, error.remedy)


# Archives: a tar of .txt files, or of further archives, as OpenWebText comes


def archive_units(path: Path) -> Iterator[Unit]:
    """Yield a unit per archive inside a plain tar, or the whole file, because it can only be read from its start."""
    whole = Unit("archive", (str(path),), 0, path.stat().st_size, name=path.name.lower(), size=path.stat().st_size)
    if path.suffix.lower() != ".tar":
        yield whole
        return
    with _whole(str(path)), tarfile.open(path, "r:") as tar:
        members = [member for member in tar if member.isfile()]
    if not members or not all(member.name.endswith(ARCHIVES) for member in members):
        yield whole
        return
    for member in sorted(members, key=lambda member: member.name):
        stop = member.offset_data + member.size
        yield Unit("archive", (str(path),), member.offset_data, stop, name=member.name, size=member.size)


def read_archive(unit: Unit, config: PrepareConfig, faults: Faults) -> Iterator[str]:
    with _whole(str(unit)), open(unit.paths[0], "rb") as file:
        # An archive inside a plain tar is a run of the outer file's bytes.
        part = io.BufferedReader(_Part(file, unit.start, unit.stop))
        yield from _texts_in(part, unit.name, str(unit), faults)


def _texts_in(file: IO[bytes], name: str, where: str, faults: Faults) -> Iterator[str]:
    """Yield the .txt members of a tar, and of the tars in it, in their order."""
    with lzma.open(file) if name.endswith(".xz") else nullcontext(file) as stream:
        with tarfile.open(fileobj=stream, mode="r|") as tar:
            for member in tar:
                content = tar.extractfile(member) if member.isfile() else None
                if content is None:
                    continue
                if member.name.lower().endswith(".txt"):
                    yield from _document(content.read(), f"{where} {member.name}", faults)
                elif member.name.endswith(ARCHIVES):
                    yield from _texts_in(content, member.name, f"{where} {member.name}", faults)
        while stream.read(1 << 20):  # to the end: an archive cut after its last document is damaged as well
            pass


class _Part(io.RawIOBase):
    """Bytes [start, stop) of a file, to be read once."""

    def __init__(self, file: IO[bytes], start: int, stop: int) -> None:
        file.seek(start)
        self.file, self.left = file, stop - start

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self.file.read(min(len(buffer), self.left))
        buffer[: len(content)] = content
        self.left -= len(content)
        return len(content)


@contextmanager
def _whole(where: str) -> Iterator[None]:
    """Report a compressed file that is cut or damaged as a `DataError`."""
    try:
        yield
    except (OSError, EOFError, lzma.LZMAError, tarfile.TarError) as error:
        raise DataError(f"{where} is damaged or cut ({first_line(error)}); fetch it again.") from None


# Data sets of the hub, streamed


def hf_units(spec: str, config: PrepareConfig) -> Iterator[Unit]:
    """Yield a unit per shard of a hub data set; `spec` is NAME or NAME:CONFIGURATION."""
    name, _, configuration = spec.partition(":")
    dataset = _stream(name, configuration, config)
    if dataset.column_names and config.text_field not in dataset.column_names:
        raise DataError(
            f'hf:{spec}: no column "{config.text_field}"; '
            f"use --text_field with one of: {', '.join(dataset.column_names)}."
        )
    for index in range(dataset.num_shards):
        yield Unit("hf", (name,), index, dataset.num_shards, name=configuration)


def read_hf(unit: Unit, config: PrepareConfig, faults: Faults) -> Iterator[str]:
    def where(number: int) -> str:
        return f"hf:{unit.paths[0]} shard {unit.start} row {number}"

    dataset = _stream(unit.paths[0], unit.name, config).shard(unit.stop, unit.start)
    for row, record in enumerate(dataset, 1):
        try:
            yield _checked(record.get(config.text_field), config.text_field)
        except NotTextError as error:
            faults.record(where, row, error.holds, error.remedy)


def _stream(name: str, configuration: str, config: PrepareConfig) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, configuration or None, split=config.hf_split, streaming=True)
    except Exception as error:  # the library raises many kinds, from a wrong split to a dead network
        raise ConfigError(
            f"source=hf:{name} with --hf_split {config.hf_split} cannot be opened ({first_line(error)}); check the "
            "name (hf:NAME or hf:NAME:CONFIGURATION), the split and the network, or give a local folder."
        ) from None
