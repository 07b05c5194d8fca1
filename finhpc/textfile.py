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


class UnreadableText(Exception):
    """Bytes that cannot be read as text: the line (0: the whole file), the problem and the remedy."""

    def __init__(self, line: int, problem: str, remedy: str) -> None:
        self.line, self.problem, self.remedy = line, problem, remedy
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
    except UnreadableText as error:
        line = f" line {error.line}" if error.line else ""
        raise ConfigError(f"{path}{line}: {error.problem}; {error.remedy}.") from None


def decode(
    content: bytes, encoding: str | None = None, otherwise: str | None = None, setting: str | None = None
) -> tuple[str, str]:
    r"""Return the text of a file's bytes with the line end "\n", and its encoding.

    A byte order mark decides the encoding and is removed. Without a mark and with `encoding` None the text is UTF-8,
    or `otherwise` if it is not valid UTF-8. Line ends are \r\n, \n and \r only (U+2028 is text). Raises
    `UnreadableText` for bytes that are not in the encoding, for bytes that would silently become other letters (UTF-8
    read as latin-1), and for NUL characters. With `otherwise`, a file that was damaged in this way and then saved is
    refused, too; without it U+FFFD is allowed, because the author of a tweet may have written it.
    """
    for magic, name in OTHER_FILES:
        if content.startswith(magic):
            raise UnreadableText(0, f"it is {name}, not text", "unpack it, or save it as UTF-8 text")
    marked = next((name for mark, name in MARKS if content.startswith(mark)), None)
    convert = "convert it to UTF-8 (iconv -f LATIN1 -t UTF-8)"
    choose = f"give --{setting}, or convert it to UTF-8" if setting else convert
    if marked and marked != UTF8 and encoding and not _name(encoding, setting).startswith(marked):
        raise UnreadableText(
            0, f"it begins with the byte order mark of {marked}, but {setting}={encoding}", f"give --{setting} {marked}"
        )
    is_utf8 = _is_utf8(content)
    used = encoding or marked or (UTF8 if is_utf8 or otherwise is None else otherwise)
    text = _decoded(content, used, setting, convert)
    if (at := text.find("\0")) >= 0:
        raise UnreadableText(
            _text_line(text, at), "a NUL character, so it is not text, or UTF-16 without a byte order mark", choose
        )
    if otherwise is not None and (at := text.find(REPLACED)) >= 0:
        raise UnreadableText(
            _text_line(text, at),
            "U+FFFD replaces a letter: the file was read in a wrong encoding and then saved",
            "fetch the original (PhraseBank comes in latin-1)",
        )
    _refuse_other_letters(content, text, used, is_utf8, setting)
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n"), used


def parse_json(text: str) -> Any:
    """Return the value of a JSON text; NaN, which Python and pandas write for a missing value, becomes None.

    Raises `ValueError` for broken JSON and for an object with a duplicate key, which would hide a value.
    """
    return json.loads(text.removeprefix("\ufeff"), object_pairs_hook=_object, parse_constant=_constant)


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text, read by the safe loader; raises `yaml.YAMLError`, also for a duplicate key."""
    return yaml.load(text, _UniqueKeys)


class _UniqueKeys(yaml.SafeLoader):
    """The safe loader, which by itself would accept duplicate keys."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.value.__hash__ is not None and (key.tag, key.value) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value} is duplicated", key.start_mark
                )
            if key.value.__hash__ is not None:
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is duplicated in one object")
    return tree


def _constant(name: str) -> float | None:
    return None if name == "NaN" else float(name)


def _name(encoding: str, setting: str | None) -> str:
    try:
        return codecs.lookup(encoding).name
    except LookupError:
        raise ConfigError(f"{setting}={encoding} is not an encoding; use utf-8 or latin-1.") from None


def _decoded(content: bytes, encoding: str, setting: str | None, convert: str) -> str:
    _name(encoding, setting)
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        byte = f"byte 0x{content[error.start]:02x} is not {encoding}"
        if CONTROL.search(content):  # quotation marks and dashes in the encoding of Windows, not letters of latin-1
            hint, other, convert = "it may be cp1252, of Windows", "cp1252", convert.replace("LATIN1", "CP1252")
        else:
            hint, other = "PhraseBank comes in latin-1", "latin-1"
        latin = f"{hint}: give --{setting} {other}, or {convert}" if setting else convert
        raise UnreadableText(content.count(b"\n", 0, error.start) + 1, byte, latin) from None
    except (UnicodeError, LookupError, ValueError):  # codecs that are not text encodings, such as rot13
        raise ConfigError(f"{setting}={encoding} is not an encoding of text; use utf-8 or latin-1.") from None


def _refuse_other_letters(content: bytes, text: str, used: str, is_utf8: bool, setting: str | None) -> None:
    name = codecs.lookup(used).name
    if name.startswith(("utf", "UTF")) or content.isascii():
        return
    if is_utf8:
        word = next(word for word in content.split() if not word.isascii()).decode(UTF8)
        raise UnreadableText(
            0, f"it is UTF-8, but would be read as {used}, which turns {word!r} into other letters",
            f"give --{setting} utf-8",
        )  # fmt: skip
    control = next((i for i, letter in enumerate(text) if "\x80" <= letter <= "\x9f"), -1)
    if name == LATIN1 and control >= 0:
        raise UnreadableText(
            _text_line(text, control),
            f"0x{ord(text[control]):02x} is not a letter in latin-1; the text may be cp1252 (Windows) or mac-roman",
            f"give --{setting} cp1252 or mac-roman" if setting else "convert it to UTF-8",
        )


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode(UTF8)
    except UnicodeDecodeError:
        return False
    return True


def _text_line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1
