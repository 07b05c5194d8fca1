"""Records of instruction data: a file or a data set of the hub in, dictionaries with their places out.

What a container holds is read as it is (JSON, JSON lines, CSV, parquet, hf:NAME); the formats that
are no tables (PhraseBank's lines, FiQA's scores, CoNLL's tags) become records here.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from finhpc.data.textfile import read_text
from finhpc.errors import ConfigError, DataError

FIQA_THRESHOLD = 0.1  # scores beyond it are positive or negative
CONLL_TYPES = {"PER": "person", "LOC": "location", "ORG": "organization"}
ENDINGS = ".json, .jsonl, .csv, .parquet, .txt"


class Record(NamedTuple):
    """Values by column, and where they stand."""

    values: dict[str, Any]
    where: str


@dataclass
class Reading:
    """What one source gave: its columns, its records, what was left out, what is worth saying."""

    source: str
    columns: list[str]
    records: Iterable[Record]
    skipped: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)


def split_name(source: str, formats: Iterable[str]) -> tuple[str, str | None]:
    """A source and the format it names (FILE:FORMAT), or None; a path that exists is a path."""
    path, colon, name = source.rpartition(":")
    if colon and name in formats and not Path(source).exists():
        return path, name
    return source, None


def read_records(source: str, encoding: str | None, hf_split: str, name: str | None = None) -> Reading:
    """Open a source. `name`: its format where it was named.

    Raises `ConfigError` where there is no such source or it is of no known kind, `DataError` where it
    is damaged or in another encoding.
    """
    if source.startswith("hf:"):
        return _hub(source, hf_split)
    path = Path(source)
    if not path.is_file():
        kind = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise ConfigError(f"data.source={source} {kind}; give a file ({ENDINGS}) or hf:NAME.")
    match path.suffix.lower():
        case ".json":
            return _json(path, encoding)
        case ".jsonl" | ".ndjson":
            return _table(source, _json_lines(path, encoding))
        case ".csv" | ".tsv":
            return _csv(path, encoding)
        case ".parquet":
            return _parquet(path)
        case ".txt" | ".conll" | ".iob":
            return _text(path, encoding, name)
    raise ConfigError(f"data.source={source} is of no known format; its name must end in {ENDINGS}.")


def _table(source: str, records: Iterable[Record]) -> Reading:
    records = list(records)
    columns = list(dict.fromkeys(column for record in records for column in record.values))
    return Reading(source, columns, records)


# JSON


def _json(path: Path, encoding: str | None) -> Reading:
    text, _ = read_text(path, encoding)
    if not text.lstrip().startswith(("[", "{")):
        raise DataError(f"{path} holds no JSON array or object; write a list of records.")
    try:
        tree = json.loads(text)
    except ValueError as error:
        if "\n{" in text.strip():  # a record a line, under a name that ends in .json
            return _table(str(path), _json_lines(path, encoding))
        raise DataError(f"{path} is broken JSON ({error}); correct it or fetch it again.") from None
    rows = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree, 1))
    reading = _table(str(path), (_object(value, f"{path} record {key}") for key, value in rows))
    return _scored(reading) if {"sentence", "info"} <= set(reading.columns) else reading


def _json_lines(path: Path, encoding: str | None) -> Iterator[Record]:
    text, _ = read_text(path, encoding)
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} line {number}: broken JSON ({error}); correct the line.") from None
        yield _object(value, f"{path} line {number}")


def _object(value: Any, where: str) -> Record:
    if not isinstance(value, dict):
        raise DataError(f"{where}: a JSON {type(value).__name__}, not an object; write one with named fields.")
    return Record(value, where)


def _scored(reading: Reading) -> Reading:
    """FiQA's sentences: a record for each score, which becomes a label."""

    def records() -> Iterator[Record]:
        for record in reading.records:
            for info in record.values.get("info") or []:
                try:
                    score = float(info["sentiment_score"])
                except (TypeError, KeyError, ValueError):
                    raise DataError(
                        f"{record.where}: no number under info / sentiment_score; FiQA's records carry one each."
                    ) from None
                yield Record({"sentence": record.values.get("sentence"), "label": score_label(score)}, record.where)

    note = f"{reading.source}: scores below -{FIQA_THRESHOLD} are negative, above {FIQA_THRESHOLD} positive"
    found = _table(reading.source, records())
    found.notes.append(f"{note}, else neutral")
    return found


def score_label(score: float) -> str:
    """FiQA's score, from -1 to 1, as a label."""
    if score > FIQA_THRESHOLD:
        return "positive"
    return "negative" if score < -FIQA_THRESHOLD else "neutral"


# Tables


def _csv(path: Path, encoding: str | None) -> Reading:
    text, _ = read_text(path, encoding)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
    try:
        header = next(rows, [])
        if len(header) < 2:
            raise DataError(f"{path} line 1: {len(header)} columns; the first line names at least two.")
        records = []
        for row in rows:
            if len(row) != len(header) and row:
                raise DataError(
                    f"{path} line {rows.line_num}: {len(row)} values, but the first line names {len(header)} columns "
                    f'({", ".join(header)}); put text that holds commas between quotation marks (").'
                )
            if row:
                records.append(Record(dict(zip(header, row, strict=True)), f"{path} line {rows.line_num}"))
    except csv.Error as error:
        raise DataError(f"{path} line {rows.line_num}: broken CSV ({error}); correct the line.") from None
    return Reading(str(path), header, records)


def _parquet(path: Path) -> Reading:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
        rows = table.to_pylist()
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise DataError(f"{path} is no whole parquet file ({reason}); fetch or write it again.") from None
    return Reading(
        str(path), table.column_names, [Record(row, f"{path} row {number}") for number, row in enumerate(rows, 1)]
    )


def _hub(source: str, split: str) -> Reading:
    """A data set of the hub or a local folder; numbered classes by their names."""
    import datasets

    name, _, configuration = source.removeprefix("hf:").partition(":")
    try:
        dataset = datasets.load_dataset(name, configuration or None, split=split)
    except Exception as error:  # the library raises many kinds, from a wrong split to a dead network
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ConfigError(
            f"data.source={source} with data.hf_split={split} cannot be opened ({reason}); check the name (hf:NAME or "
            "hf:NAME:CONFIGURATION), the split and the network, or give a file."
        ) from None
    named: dict[str, Callable[[int], str]] = {
        column: kind.int2str for column, kind in dataset.features.items() if isinstance(kind, datasets.ClassLabel)
    }

    def records() -> Iterator[Record]:
        for row, values in enumerate(dataset, 1):
            for column, name_of in named.items():
                if values[column] is not None and values[column] >= 0:
                    values[column] = name_of(values[column])
            yield Record(values, f"{source} row {row}")

    return Reading(source, list(dataset.column_names), records())


# Text: PhraseBank's lines, CoNLL's words


def _text(path: Path, encoding: str | None, name: str | None) -> Reading:
    text, used = read_text(path, encoding, otherwise="latin-1")
    lines = text.split("\n")
    filled = [line for line in lines if line.strip()]
    if name == "conll" or (name is None and filled and filled[0].startswith("-DOCSTART-")):
        return _conll(path, lines)
    reading = _table(str(path), _phrases(path, lines))
    if not text.isascii():
        reading.notes.append(f"{path}: read as {used}")
    return reading


def _phrases(path: Path, lines: list[str]) -> Iterator[Record]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        sentence, at, label = line.rstrip("\r").rpartition("@")
        if not at:
            raise DataError(
                f"{path} line {number}: no `@label` at its end, as PhraseBank has; name another format (FILE:conll) "
                "or correct the line."
            )
        yield Record({"sentence": sentence, "label": label}, f"{path} line {number}")


def _conll(path: Path, lines: list[str]) -> Reading:
    """A record for each named entity: its words, type and sentence."""
    skipped: Counter[str] = Counter()

    def records() -> Iterator[Record]:
        for number, rows in _sentences(path, lines):
            entities = list(_entities(rows))
            skipped["sentences without an entity"] += not entities
            for words, tag in entities:
                if tag not in CONLL_TYPES:
                    skipped[f"entities of type {tag}"] += 1
                    continue
                sentence = " ".join(word for word, _ in rows)
                values = {"sentence": sentence, "entity": words, "label": CONLL_TYPES[tag]}
                yield Record(values, f"{path} line {number}")

    reading = _table(str(path), records())
    reading.skipped = skipped
    return reading


def _sentences(path: Path, lines: list[str]) -> Iterator[tuple[int, list[tuple[str, str]]]]:
    """First line, and (word, tag) pairs, of each run of lines between empty ones."""
    rows: list[tuple[str, str]] = []
    first = 1
    for number, line in enumerate([*lines, ""], 1):
        parts = line.split()
        if not parts or parts[0] == "-DOCSTART-":
            if rows:
                yield first, rows
            rows, first = [], number + 1
            continue
        tag = parts[-1]
        if len(parts) < 2 or not (tag == "O" or tag[:2] in ("I-", "B-", "E-", "S-")):
            raise DataError(
                f"{path} line {number}: {tag!r} is no tag; CoNLL's lines end in O, I-TYPE or B-TYPE. Correct the line, "
                "or name another format (FILE:phrasebank)."
            )
        rows.append((parts[0], tag))


def _entities(rows: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Runs of words of one type; B- and S- begin another."""
    words: list[str] = []
    kind = ""
    for word, tag in [*rows, ("", "O")]:
        if words and (tag[2:] != kind or tag[:2] in ("B-", "S-")):
            yield " ".join(words), kind
            words = []
        if tag != "O":
            words.append(word)
            kind = tag[2:]
