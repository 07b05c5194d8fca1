"""Read text files: byte order marks, encodings, line ends, JSON and YAML.

All readers of text, prompts, tables and settings use this module, so that a file means the same everywhere.
"""

from __future__ import annotations

import codecs
import json
import re
from pathlib import Path
from typing import Any

import yaml

from finhpc.errors import ConfigError

UTF8, LATIN1 = "utf-8", "iso8859-1"
REPLACED = "\ufffd"
CONVERT = "convert it to UTF-8 (iconv -f LATIN1 -t UTF-8)"
# The order matters: the mark of UTF-32 begins with that of UTF-16.
MARKS = (
    (codecs.BOM_UTF8, UTF8),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
CONTROL = re.compile(rb"[\x80-\x9f]")
OTHER_FILES = ((b"\x1f\x8b", "a gzip archive"), (b"PK\x03\x04", "a ZIP archive or an Excel file"), (b"PAR1", "parquet"))


class NotTextError(Exception):
    """Bytes or a value that cannot be read as text: the problem, the remedy, and the line (0: the whole file)."""

    def __init__(self, problem: str, remedy: str = "correct it", line: int = 0) -> None:
        self.problem, self.remedy, self.line = problem, remedy, line
        super().__init__(problem)


def read_text(
    path: Path, encoding: str | None = None, otherwise: str | None = None, setting: str | None = "data.encoding"
) -> tuple[str, str]:
    r"""Return the text of a file with the line end "\n", and its encoding.

    `encoding`, `otherwise`: see `decode`. `setting`: the setting for the encoding, named in the remedy; None if there
    is none. Raises `ConfigError` with the line and the byte for a file in another encoding.
    """
    try:
        return decode(path.read_bytes(), encoding, otherwise, setting)
    except NotTextError as error:
        line = f" line {error.line}" if error.line else ""
        raise ConfigError(f"{path}{line}: {error.problem}; {error.remedy}.") from None


def decode(
    content: bytes, encoding: str | None = None, otherwise: str | None = None, setting: str | None = None
) -> tuple[str, str]:
    r"""Return the text of a file's bytes with the line end "\n", and its encoding.

    A byte order mark decides the encoding and is removed. Without a mark and with `encoding` None the text is UTF-8,
    or `otherwise` if it is not valid UTF-8. Line ends are \r\n, \n and \r only (U+2028 is text). Raises
    `NotTextError` for bytes that are not in the encoding, for bytes that would silently become other letters (UTF-8
    read as latin-1), and for NUL characters. With `otherwise`, a file that was damaged in this way and then saved is
    refused, too; without it U+FFFD is allowed, because the author of a tweet may have written it.
    """
    for magic, name in OTHER_FILES:
        if content.startswith(magic):
            raise NotTextError(f"it is {name}, not text", "unpack it, or save it as UTF-8 text")
    marked = next((name for mark, name in MARKS if content.startswith(mark)), None)
    if marked and marked != UTF8 and encoding and not _codec(encoding, setting).startswith(marked):
        raise NotTextError(
            f"it begins with the byte order mark of {marked}, but {setting}={encoding}", f"give --{setting} {marked}"
        )
    try:
        utf8: str | None = content.decode(UTF8)
    except UnicodeDecodeError:
        utf8 = None
    used = encoding or marked or (UTF8 if utf8 is not None or otherwise is None else otherwise)
    text = _decoded(content, used, setting)

    def line(at: int) -> int:
        return text.count("\n", 0, at) + 1

    if (at := text.find("\0")) >= 0:
        raise NotTextError(
            "a NUL character, so it is not text, or UTF-16 without a byte order mark",
            f"give --{setting}, or convert it to UTF-8" if setting else CONVERT,
            line(at),
        )
    if otherwise is not None and (at := text.find(REPLACED)) >= 0:
        raise NotTextError(
            "U+FFFD replaces a letter: the file was read in a wrong encoding and then saved",
            "fetch the original (PhraseBank comes in latin-1)",
            line(at),
        )
    codec = _codec(used, setting)
    if not codec.startswith("utf") and not content.isascii():
        if utf8 is not None:
            word = next(word for word in utf8.split() if not word.isascii())
            raise NotTextError(
                f"it is UTF-8, but would be read as {used}, which turns {word!r} into other letters",
                f"give --{setting} utf-8",
            )
        if codec == LATIN1 and (control := CONTROL.search(content)):
            raise NotTextError(
                f"0x{control[0].hex()} is not a letter in latin-1; the text may be cp1252 (Windows) or mac-roman",
                f"give --{setting} cp1252 or mac-roman" if setting else "convert it to UTF-8",
                line(control.start()),
            )
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n"), used


def _decoded(content: bytes, encoding: str, setting: str | None) -> str:
    _codec(encoding, setting)
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        hint, other, convert = "PhraseBank comes in latin-1", "latin-1", CONVERT
        if CONTROL.search(content):  # quotation marks and dashes in the encoding of Windows, not letters of latin-1
            hint, other, convert = "it may be cp1252, of Windows", "cp1252", CONVERT.replace("LATIN1", "CP1252")
        remedy = f"{hint}: give --{setting} {other}, or {convert}" if setting else convert
        line = content.count(b"\n", 0, error.start) + 1
        raise NotTextError(f"byte 0x{content[error.start]:02x} is not {encoding}", remedy, line) from None
    except (UnicodeError, LookupError, ValueError):  # codecs that are not text encodings, such as rot13
        raise ConfigError(f"{setting}={encoding} is not an encoding of text; use utf-8 or latin-1.") from None


def _codec(encoding: str, setting: str | None) -> str:
    """Return Python's own name of an encoding, in lower case."""
    try:
        return codecs.lookup(encoding).name.lower()
    except LookupError:
        raise ConfigError(f"{setting}={encoding} is not an encoding; use utf-8 or latin-1.") from None


def parse_json(text: str) -> Any:
    """Return the value of a JSON text; NaN, which Python and pandas write for a missing value, becomes None.

    Raises `ValueError` for broken JSON and for an object with a duplicate key, which would hide a value.
    """

    def constant(name: str) -> float | None:
        return None if name == "NaN" else float(name)

    return json.loads(text.removeprefix("\ufeff"), object_pairs_hook=_object, parse_constant=constant)


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text, read by the safe loader; raises `yaml.YAMLError`, also for a duplicate key."""
    return yaml.load(text, _UniqueKeys)


def read_yaml(path: Path, name: str) -> Any:
    """Return the value of a YAML file; `name`: the setting that named it. Raises `ConfigError` for broken YAML."""
    try:
        return parse_yaml(read_text(path, setting=None)[0])
    except yaml.YAMLError as error:
        raise ConfigError(f"{name} is not valid YAML: {error}; correct that line.") from None


class _UniqueKeys(yaml.SafeLoader):
    """The safe loader, which by itself would accept duplicate keys."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if (key.tag, key.value) in seen:
                problem = f"the key {key.value} is duplicated"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is duplicated in one object")
    return tree
