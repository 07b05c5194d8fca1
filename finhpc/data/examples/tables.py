"""Tables as records: CSV, parquet, and data sets of the hub or of a local folder."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from finhpc.errors import ConfigError, DataError
from finhpc.textfile import read_text

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}

QUOTES = 'a value that begins with a quotation mark ends with one, and holds others doubled ("He said ""buy""")'

csv.field_size_limit(sys.maxsize)  # the default refuses a text of more than 131,072 characters, such as a filing


class Record(NamedTuple):
    """Values by column, and the place of the record in its file."""

    values: dict[str, Any]
    where: str


@dataclass
class Reading:
    """An open source: its columns and records, how many records were skipped and why, and notes on what was guessed.

    `format`: the format that the file itself proves, such as PhraseBank's lines.
    """

    source: str
    columns: list[str]
    records: Iterable[Record]
    skipped: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    format: str | None = None


def read_csv(path: Path, encoding: str | None) -> Reading:
    """Read a table with a header; the delimiter is the one that splits the header into the most names.

    A column without a name (an index, or what spreadsheets write next to a table) and a row without a value are
    skipped and reported.
    """
    text, used = read_text(path, encoding)
    first, _, rest = text.partition("\n")
    usual = "\t" if path.suffix.lower() == ".tsv" else ","
    before = 0
    if first.startswith("sep=") and len(first) == 5:  # as Excel writes and reads it
        delimiter, text, before = first[4], rest, 1
    else:
        delimiter = _delimiter(first, usual)
    # Spaces after a delimiter are skipped: in `1, "a, b"` the quotation marks would else be text.
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True)
    skipped: Counter[str] = Counter()
    nameless = 0
    try:
        header = [name.strip() for name in next(rows, [])]
        _check_header(path, header)
        records = []
        begin = rows.line_num + 1
        for row in rows:
            where, begin = f"{path} line {begin + before}", rows.line_num + 1
            if row and not any(value.strip() for value in row):
                skipped["rows without a value"] += 1
                continue
            if len(row) != len(header) and row:
                raise ConfigError(
                    f"{where}: {len(row)} values, but the first line names {len(header)} columns ({', '.join(header)})"
                    f'; put text that holds {DELIMITERS.get(delimiter, repr(delimiter))} between quotation marks (").'
                )
            if delimiter == "\t" and any("\t" in value and "\n" in value for value in row):
                raise ConfigError(f"{where}: a quotation mark joins several rows; {QUOTES}.")
            if row:
                nameless += any(value for name, value in zip(header, row, strict=True) if not name)
                values = {name: value for name, value in zip(header, row, strict=True) if name}
                records.append(Record(values, where))
    except csv.Error as error:
        reason = "a quotation mark is never closed" if "end of data" in str(error) else str(error)
        raise ConfigError(f"{path} line {rows.line_num + before}: broken CSV ({reason}); {QUOTES}.") from None
    notes = encoding_note(path, text, used)
    if nameless:
        notes.append(f"{path}: values of columns without a name are not used, of {nameless:,} rows")
    if delimiter != usual:
        notes.append(f"{path}: read as separated by {DELIMITERS.get(delimiter, repr(delimiter))}")
    return Reading(str(path), [name for name in header if name], records, skipped, notes)


def encoding_note(path: Path, text: str, used: str) -> list[str]:
    """The line that reports an encoding other than UTF-8, if it matters."""
    return [] if text.isascii() or used == "utf-8" else [f"{path}: read as {used}"]


def _delimiter(header: str, usual: str) -> str:
    def columns(delimiter: str) -> int:
        return len(next(csv.reader([header], delimiter=delimiter), []))

    return max((usual, *(name for name in DELIMITERS if name != usual)), key=columns)  # the first of equal ones


def _check_header(path: Path, header: list[str]) -> None:
    if len(header) < 2:
        raise ConfigError(
            f"{path} line 1: {len(header)} columns; the first line names at least two, separated by "
            f"{', '.join(list(DELIMITERS.values())[:-1])} or {list(DELIMITERS.values())[-1]}."
        )
    check_names(str(path), [name for name in header if name])


def check_names(source: str, names: list[str]) -> None:
    """Raise `ConfigError` for a column that occurs twice, because one would hide the other."""
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ConfigError(f"{source}: the column {twice[0]!r} occurs twice; rename or remove one.")


# Parquet


def read_parquet(path: Path) -> Reading:
    """Read a parquet file; numbered classes become the names that `datasets` stored in it."""
    try:
        with open_parquet(str(path)) as file:
            header, names = list(file.schema_arrow.names), _class_names(file.schema_arrow)
            check_names(str(path), header)
            columns = [column_values(column) for column in file.read().columns]
    except DataError as error:
        raise ConfigError(str(error)) from None
    records = []
    for number, row in enumerate(zip(*columns, strict=True), 1):
        where = f"{path} row {number}"
        if broken := next((name for name, value in zip(header, row, strict=True) if value is NOT_UTF8), None):
            raise ConfigError(f"{where}: {broken} is not UTF-8; write the file again.")
        values = dict(zip(header, row, strict=True))
        records.append(Record(values | _named(values, names), where))
    return Reading(str(path), header, records)


@contextmanager
def open_parquet(path: str) -> Iterator[Any]:
    """Open a parquet file. Raises `DataError` if it is damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            yield file
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{path} is not a complete parquet file ({first_line(error)}); fetch or write it again."
        ) from None


NOT_UTF8 = object()  # the value of a parquet cell whose bytes are not the text that its column promises


def column_values(column: Any) -> list[Any]:
    """Return the values of a parquet column: text as str, null as None, `NOT_UTF8` for text that is not UTF-8."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    try:
        return column.to_pylist()  # type: ignore[no-any-return]
    except UnicodeDecodeError:
        wide = pa.types.is_large_string(column.type)
        raw = column.cast(pa.large_binary() if wide else pa.binary()).to_pylist()
        return [_decoded(value) for value in raw]


def _decoded(value: bytes | None) -> Any:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return NOT_UTF8


def _class_names(schema: Any) -> dict[str, list[str]]:
    """Return the names of numbered classes by column, from the features that `datasets` stores with a table."""
    stored = (schema.metadata or {}).get(b"huggingface")
    try:
        features = json.loads(stored)["info"]["features"] if stored else {}
        return {
            name: kind["names"]
            for name, kind in features.items()
            if isinstance(kind, dict) and kind.get("_type") == "ClassLabel" and kind.get("names")
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _named(values: dict[str, Any], names: dict[str, list[str]]) -> dict[str, str]:
    """Return the names of the numbered classes in a record, except for numbers without a name."""
    return {
        column: known[values[column]]
        for column, known in names.items()
        if isinstance(values.get(column), int) and 0 <= values[column] < len(known)
    }


# Data sets of the hub and of local folders


def read_hub(source: str, split: str) -> Reading:
    """Read a data set of the hub or a local folder; numbered classes become their names."""
    import datasets

    name, _, configuration = source.removeprefix("hf:").partition(":")
    folder = Path(name).expanduser()
    name = str(folder) if folder.is_dir() else name
    datasets.disable_progress_bars()
    try:
        if any((folder / file).is_file() for file in ("state.json", "dataset_dict.json")):  # of save_to_disk
            opened = datasets.load_from_disk(name)
            if isinstance(opened, dict) and split not in opened:
                raise ValueError(f"it has the splits {', '.join(opened)}")
            dataset = opened[split] if isinstance(opened, dict) else opened
        else:
            dataset = datasets.load_dataset(name, configuration or None, split=split)
    except Exception as error:  # the library raises many kinds, from a wrong split to a dead network
        raise ConfigError(
            f"data.source={source} with data.hf_split={split} cannot be opened ({first_line(error)}); check the name "
            "(hf:NAME or hf:NAME:CONFIGURATION), the split and the network, or give a file."
        ) from None
    names = {column: kind.names for column, kind in dataset.features.items() if isinstance(kind, datasets.ClassLabel)}

    def records() -> Iterator[Record]:
        for row, values in enumerate(dataset, 1):
            yield Record(values | _named(values, names), f"{source} row {row}")

    return Reading(source, list(dataset.column_names), records())


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its kind."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
