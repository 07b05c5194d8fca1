"""Tables as records: CSV, parquet, and data sets of the hub or of a local folder."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from finhpc.data.rows import NOT_UTF8, column_values, open_dataset, open_parquet
from finhpc.errors import ConfigError, DataError
from finhpc.textfile import read_text

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}

QUOTES = 'a value that begins with a quotation mark ends with one, and contains others doubled ("He said ""buy""")'

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
    records: list[Record]
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
        if len(header) < 2:
            *most, last = DELIMITERS.values()
            raise ConfigError(
                f"{path} line 1: {len(header)} columns; the first line names at least two, separated by "
                f"{', '.join(most)} or {last}."
            )
        check_names(str(path), [name for name in header if name])
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
                    f'; put text with {DELIMITERS.get(delimiter, repr(delimiter))} between quotation marks (").'
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


def check_names(source: str, names: list[str]) -> None:
    """Raise `ConfigError` for a column that occurs twice, because one would hide the other."""
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ConfigError(f"{source}: the column {twice[0]!r} occurs twice; rename or remove one.")


# Parquet, data sets of the hub and of local folders: numbered classes become the names that `datasets` stores


def read_parquet(path: Path) -> Reading:
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


def read_hub(source: str, split: str) -> Reading:
    import datasets

    datasets.disable_progress_bars()
    dataset = open_dataset(source, split, prefix="data.")
    names = {column: kind.names for column, kind in dataset.features.items() if isinstance(kind, datasets.ClassLabel)}
    records = [Record(values | _named(values, names), f"{source} row {row}") for row, values in enumerate(dataset, 1)]
    return Reading(source, list(dataset.column_names), records)


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
