"""Records of instruction data: a file or a hub data set -> dictionaries with their places.

JSON, JSON lines, CSV, parquet and hf:NAME are read as they are; formats that are not tables (PhraseBank's lines,
FiQA's scores, CoNLL's tags) become records here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from finhpc.data.examples.tables import Reading, Record, encoding_note, read_csv, read_hub, read_parquet
from finhpc.data.rows import json_object
from finhpc.errors import ConfigError
from finhpc.textfile import NotTextError, parse_json, read_text

FIQA_THRESHOLD = 0.1  # scores beyond it are positive or negative
CONLL_TYPES = {"PER": "person", "LOC": "location", "ORG": "organization"}
ENDINGS = ".json, .jsonl, .csv, .parquet, .txt"


def split_name(source: str, formats: Iterable[str]) -> tuple[str, str | None]:
    """Return a source and the format it names (FILE:FORMAT), or None; a path that exists is a path."""
    path, colon, name = source.rpartition(":")
    if colon and name in formats and not Path(source).expanduser().exists():
        return path, name
    return source, None


def read_records(source: str, encoding: str | None, hf_split: str, name: str | None = None) -> Reading:
    """Open a source. `name`: its format if the user named it.

    Raises `ConfigError` for a source that does not exist, has an unknown format, is damaged or has another encoding.
    """
    if source.startswith("hf:"):
        return read_hub(source, hf_split)
    path = Path(source).expanduser()
    if not path.is_file():
        kind = "is a folder, not a file" if source and path.is_dir() else "does not exist"
        name = f"hf:{source} for a data set that is a folder" if source and path.is_dir() else "hf:NAME"
        raise ConfigError(f"data.source={source} {kind}; give a file ({ENDINGS}) or {name}.")
    match path.suffix.lower():
        case ".json":
            return _json(path, encoding)
        case ".jsonl" | ".ndjson":
            return _json_lines(path, encoding)
        case ".csv" | ".tsv":
            return read_csv(path, encoding)
        case ".parquet":
            return read_parquet(path)
        case ".txt" | ".conll" | ".iob":
            return _text(path, encoding, name)
    raise ConfigError(f"data.source={source} has an unknown format; its name must end in {ENDINGS}.")


def _table(source: str, records: list[Record], notes: list[str]) -> Reading:
    columns = list(dict.fromkeys(column for record in records for column in record.values))
    return Reading(source, columns, records, notes=notes)


# JSON


def _json(path: Path, encoding: str | None) -> Reading:
    text, used = read_text(path, encoding)
    if not text.lstrip().startswith(("[", "{")):
        raise ConfigError(f"{path} has no JSON array or object; write a list of records.")
    try:
        tree = parse_json(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("{") and "\n{" in text.strip():  # a record per line, in a file named .json
            return _json_lines(path, encoding)
        raise ConfigError(f"{path} is broken JSON ({error}); correct it or fetch it again.") from None
    if isinstance(tree, dict):
        _check_keyed(path, tree)
    records = []
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree, 1):
        where = f"{path} record {key}"
        if not isinstance(value, dict):
            kind = type(value).__name__
            raise ConfigError(f"{where}: a JSON {kind}, not an object; write one with named fields.")
        records.append(Record(value, where))
    return _with_labels(_table(str(path), records, encoding_note(path, text, used)))


def _check_keyed(path: Path, tree: dict[str, Any]) -> None:
    """Refuse an object with a list of records under a name, or with values by column, as pandas writes them."""
    if name := next((name for name, value in tree.items() if isinstance(value, list)), None):
        raise ConfigError(f"{path} holds a list under the name {name!r}; write the list of records alone.")
    inner = [value for value in tree.values() if isinstance(value, dict) and value]
    if inner and len(inner) == len(tree) and all(key.isdigit() for value in inner for key in value):
        raise ConfigError(
            f"{path} holds values by column ({', '.join(list(tree)[:5])}), as pandas' to_json writes them; write "
            "records with to_json(orient='records')."
        )


def _json_lines(path: Path, encoding: str | None) -> Reading:
    text, used = read_text(path, encoding)
    records = []
    for number, line in enumerate(text.split("\n"), 1):
        where = f"{path} line {number}"
        try:
            if line.strip():
                records.append(Record(json_object(line), where))
        except NotTextError as error:
            raise ConfigError(f"{where}: {error.problem}; {error.remedy}.") from None
    return _with_labels(_table(str(path), records, encoding_note(path, text, used)))


def _with_labels(reading: Reading) -> Reading:
    """Return the same records; of FiQA's, which have scores, one with a label per score."""
    if not {"sentence", "info"} <= set(reading.columns):
        return reading
    records: list[Record] = []
    skipped: Counter[str] = Counter()
    for record in reading.records:
        scores = record.values.get("info") or []
        skipped["sentences without a score"] += not scores
        for info in scores:
            score = _score(info, record.where)
            label = "negative" if score < -FIQA_THRESHOLD else "positive" if score > FIQA_THRESHOLD else "neutral"
            records.append(Record({"sentence": record.values.get("sentence"), "label": label}, record.where))
    note = (
        f"{reading.source}: scores below -{FIQA_THRESHOLD} are negative, above {FIQA_THRESHOLD} positive, else neutral"
    )
    labeled = _table(reading.source, records, [*reading.notes, note])
    labeled.skipped, labeled.format = skipped, "fiqa"
    return labeled


def _score(info: Any, where: str) -> float:
    try:
        score = float(info["sentiment_score"])
    except (TypeError, KeyError, ValueError):
        raise ConfigError(f"{where}: no number under info / sentiment_score; FiQA's records carry one each.") from None
    if not -1 <= score <= 1:  # also NaN
        raise ConfigError(f"{where}: sentiment_score={score:g} is not from -1 to 1, as FiQA's are; correct it.")
    return score


# Text: PhraseBank's lines, CoNLL's words


def _text(path: Path, encoding: str | None, name: str | None) -> Reading:
    text, used = read_text(path, encoding, otherwise="latin-1")
    lines = text.split("\n")
    first = next((line for line in lines if line.strip()), "")
    tagged = path.suffix.lower() in (".conll", ".iob") or first.startswith("-DOCSTART-")
    if name == "conll" or (name is None and tagged):
        return _conll(path, lines, encoding_note(path, text, used))
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        sentence, at, label = line.rpartition("@")
        if not at:
            raise ConfigError(
                f"{path} line {number}: no `@label` at its end, as PhraseBank has; name another format (FILE:conll) "
                "or correct the line."
            )
        records.append(Record({"sentence": sentence, "label": label}, f"{path} line {number}"))
    reading = _table(str(path), records, [] if text.isascii() else [f"{path}: read as {used}"])
    reading.format = "phrasebank"
    return reading


def _conll(path: Path, lines: list[str], notes: list[str]) -> Reading:
    """Read a record per named entity: its words, type and sentence."""
    records: list[Record] = []
    skipped: Counter[str] = Counter()
    for number, rows in _sentences(path, lines):
        sentence = " ".join(word for word, _ in rows)
        entities = list(_entities(rows))
        skipped["sentences without an entity"] += not entities
        for words, tag in entities:
            if tag in CONLL_TYPES:
                values = {"sentence": sentence, "entity": words, "label": CONLL_TYPES[tag]}
                records.append(Record(values, f"{path} line {number}"))
            else:
                skipped[f"entities of type {tag}"] += 1
    reading = _table(str(path), records, notes)
    reading.skipped, reading.format = skipped, "conll"
    return reading


def _sentences(path: Path, lines: list[str]) -> Iterator[tuple[int, list[tuple[str, str]]]]:
    """Yield the first line and the (word, tag) pairs of each run of lines between empty ones."""
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
            raise ConfigError(
                f"{path} line {number}: {tag!r} is not a tag; CoNLL's lines end in O, I-TYPE or B-TYPE. Correct it, "
                "or name another format (FILE:phrasebank)."
            )
        rows.append((parts[0], tag))


def _entities(rows: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Yield runs of words of one type; B- and S- begin a new one."""
    words: list[str] = []
    kind = ""
    for word, tag in [*rows, ("", "O")]:
        if words and (tag[2:] != kind or tag[:2] in ("B-", "S-")):
            yield " ".join(words), kind
            words = []
        if tag != "O":
            words.append(word)
            kind = tag[2:]
