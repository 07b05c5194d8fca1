"""Rows of JSON lines, parquet files and data sets of the hub, read in one way for pretraining and finetuning."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finhpc.errors import ConfigError, DataError
from finhpc.textfile import NotTextError, parse_json

NOT_UTF8 = object()  # the value of a parquet cell whose bytes are not the text that its column promises


def json_object(line: str | bytes, example: str = "one with named fields") -> dict[str, Any]:
    """Return the object in a line of JSON. Raises `NotTextError`; `example`: what the remedy says to write."""
    try:
        value = parse_json(line if isinstance(line, str) else line.decode())
    except UnicodeDecodeError as error:
        raise NotTextError(f"not UTF-8 (byte {error.start + 1} of the line)", "convert the file to UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise NotTextError(f"broken JSON ({error})", "correct the line") from None
    if not isinstance(value, dict):
        raise NotTextError(f"a JSON {type(value).__name__}, not an object", f"write {example}")
    return value


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


def open_dataset(source: str, split: str, prefix: str = "", streaming: bool = False) -> Any:
    """Open hf:NAME or hf:NAME:CONFIGURATION, a data set of the hub or of a local folder, also one of `save_to_disk`.

    `prefix`: of the names of the settings in the error. Raises `ConfigError` if it cannot be opened.
    """
    import datasets

    name, _, configuration = source.removeprefix("hf:").partition(":")
    folder = Path(name).expanduser()
    name = str(folder) if folder.is_dir() else name
    try:
        if streaming or not any((folder / file).is_file() for file in ("state.json", "dataset_dict.json")):
            return datasets.load_dataset(name, configuration or None, split=split, streaming=streaming)
        opened = datasets.load_from_disk(name)
        if isinstance(opened, dict) and split not in opened:
            raise ValueError(f"it has the splits {', '.join(opened)}")
        return opened[split] if isinstance(opened, dict) else opened
    except Exception as error:  # the library raises many kinds, from a wrong split to a dead network
        raise ConfigError(
            f"{prefix}source={source} with --{prefix}hf_split {split} cannot be opened ({first_line(error)}); check "
            "the name (hf:NAME or hf:NAME:CONFIGURATION), the split and the network, or give a local file."
        ) from None


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its kind."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
