"""File formats of text: how files are divided into units of work, and how the texts of a unit are read.

`jsonl_units` and its like divide files; the readers yield texts one at a time, in file order, and report the file and
line (or row) of what they cannot read.
"""

from __future__ import annotations

import io
import lzma
import tarfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, Literal, TypeVar

from finhpc.data.examples.values import is_missing, plain_text, shown
from finhpc.data.rows import NOT_UTF8, column_values, first_line, json_object, open_dataset, open_parquet
from finhpc.errors import DataError
from finhpc.settings.prepare import PrepareConfig
from finhpc.textfile import NotTextError, decode

UNIT_BYTES = 4 << 20  # input per unit, about a second of work, so that small sources are divided evenly as well
FILES_PER_UNIT = 2000
COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
ARCHIVES = (".tar", ".tar.xz", ".xz")
Kind = Literal["jsonl", "parquet", "text", "archive", "hf", "docs"]
R = TypeVar("R")


@dataclass(frozen=True)
class Unit:
    """The piece of a source that one task reads. `start` and `stop` count bytes or, of parquet, row groups."""

    kind: Kind
    paths: tuple[str, ...]
    start: int = 0
    stop: int = 0
    name: str = ""  # an archive's member
    size: int = 0  # bytes of input, for progress; 0: unknown

    def __str__(self) -> str:
        return f"{self.paths[0]}{f' ({self.name})' if self.name else ''}"


class Faults:
    """Raises an error at a broken record (`strict`), or counts it (`skip`)."""

    def __init__(self, on_error: str) -> None:
        self.strict = on_error == "strict"
        self.broken = 0

    def texts(
        self, rows: Iterable[tuple[int, R]], text_of: Callable[[R], str], where: Callable[[int], str]
    ) -> Iterator[str]:
        """Yield the text of each numbered row; `where` returns the place of a row by its number."""
        for number, row in rows:
            try:
                yield text_of(row)
            except NotTextError as error:
                if self.strict:
                    place = f"{where(number)} line {error.line}" if error.line else where(number)
                    raise DataError(
                        f"{place}: {error.problem}; {error.remedy}, or count and skip such records with --on_error "
                        "skip."
                    ) from None
                self.broken += 1


def _checked(value: Any, field: str) -> str:
    """Return the text in a field of a row. Raises `NotTextError`."""
    if value is NOT_UTF8:
        raise NotTextError("not UTF-8", "convert it")
    if is_missing(value):
        raise NotTextError(f'field "{field}" holds {shown(value)}, not text')
    try:
        return plain_text(value)
    except NotTextError as error:
        raise NotTextError(f'field "{field}" holds {error.problem}', error.remedy) from None


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
    field = config.text_field

    def text_of(line: bytes) -> str:
        record = json_object(line, f'{{"{field}": "..."}}')
        if field not in record:
            names = ", ".join(name for name, value in record.items() if isinstance(value, str))
            raise NotTextError(
                f'no field "{field}"', f"use --text_field with one of: {names or '(no field holds text)'}"
            )
        return _checked(record[field], field)

    # Splitting again finds the lines of a file that ends them with \r alone, which JSON has nowhere else.
    lines = enumerate((part for read in _lines(unit) for part in read.splitlines()), 1)
    filled = ((number, line) for number, line in lines if line and not line.isspace())
    yield from faults.texts(filled, text_of, lambda number: f"{unit.paths[0]} line {_lines_before(unit) + number}")


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
    field = config.text_field
    with open_parquet(unit.paths[0]) as file:
        before = sum(file.metadata.row_group(group).num_rows for group in range(unit.start))
        groups = list(range(unit.start, unit.stop))
        batches = file.iter_batches(batch_size=512, row_groups=groups, columns=[field], use_threads=False)
        values = (value for batch in batches for value in column_values(batch.column(0)))
        rows = enumerate(values, before + 1)
        yield from faults.texts(
            rows, lambda value: _checked(value, field), lambda number: f"{unit.paths[0]} row {number}"
        )


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


def file_units(kind: Kind, paths: list[Path], unit_bytes: int) -> Iterator[Unit]:
    """Yield groups of files."""
    group: list[str] = []
    size = 0
    for index, path in enumerate(paths):
        group.append(str(path))
        size += path.stat().st_size
        if size >= unit_bytes or len(group) == FILES_PER_UNIT or index == len(paths) - 1:
            yield Unit(kind, tuple(group), size=size)
            group, size = [], 0


def read_text(unit: Unit, config: PrepareConfig, faults: Faults) -> Iterator[str]:
    for path in unit.paths:
        yield from _document(Path(path).read_bytes(), path, faults)


def _document(content: bytes, where: str, faults: Faults) -> Iterator[str]:
    yield from faults.texts([(1, content)], lambda content: decode(content)[0], lambda _: where)


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


def hf_units(source: str, config: PrepareConfig) -> Iterator[Unit]:
    """Yield a unit per shard of a data set."""
    dataset = open_dataset(source, config.hf_split, streaming=True)
    if dataset.column_names and config.text_field not in dataset.column_names:
        raise DataError(
            f'{source}: no column "{config.text_field}"; use --text_field with one of: '
            f"{', '.join(dataset.column_names)}."
        )
    for index in range(dataset.num_shards):
        yield Unit("hf", (source,), index, dataset.num_shards)


def read_hf(unit: Unit, config: PrepareConfig, faults: Faults) -> Iterator[str]:
    (source,), field = unit.paths, config.text_field
    dataset = open_dataset(source, config.hf_split, streaming=True).shard(unit.stop, unit.start)
    yield from faults.texts(
        enumerate(dataset, 1),
        lambda record: _checked(record.get(field), field),
        lambda row: f"{source} shard {unit.start} row {row}",
    )
