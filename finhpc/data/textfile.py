"""A text file in its encoding, or told clearly that it is in another."""

from __future__ import annotations

import codecs
from pathlib import Path

from finhpc.errors import ConfigError, DataError

UTF8, LATIN1 = "utf-8", "iso8859-1"
REPLACED = "\ufffd"


def read_text(path: Path, encoding: str | None, otherwise: str | None = None) -> tuple[str, str]:
    """The text of a file with plain line ends, and the encoding it was read in.

    `encoding` None: UTF-8, and `otherwise` for what is not valid UTF-8. Raises `ConfigError` for an
    encoding that does not exist, `DataError`, with the line and byte, for one the file is not in:
    also where the bytes could be read but the letters would be others, which is how latin-1 read as
    UTF-8 and the reverse damage a data set unseen. With `otherwise`, a file that was damaged so and
    saved is refused, too; elsewhere, as in tweets, U+FFFD may be what was written.
    """
    content = path.read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content[:4096]:
        if encoding is None or not encoding.lower().startswith(("utf-16", "utf16", "utf_16")):
            raise DataError(f"{path} is UTF-16, or no text; give --data.encoding utf-16, or convert it to UTF-8.")
        return _lines(_decoded(path, content, encoding)), encoding
    is_utf8 = _is_utf8(content)
    used = encoding or (UTF8 if is_utf8 or otherwise is None else otherwise)
    text = _decoded(path, content, used)
    if otherwise is not None:
        _refuse_replaced(path, text)
    _refuse_others(path, content, text, used, is_utf8)
    return _lines(text.removeprefix("\ufeff")), used


def _decoded(path: Path, content: bytes, encoding: str) -> str:
    try:
        return content.decode(encoding)
    except LookupError:
        raise ConfigError(f"data.encoding={encoding} is no encoding; use utf-8 or latin-1.") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} line {_line(content, error.start)}: byte 0x{content[error.start]:02x} is not {encoding}; "
            "PhraseBank comes in latin-1: give --data.encoding latin-1, or convert the file to UTF-8 "
            "(iconv -f LATIN1 -t UTF-8)."
        ) from None


def _refuse_replaced(path: Path, text: str) -> None:
    if (at := text.find(REPLACED)) >= 0:
        raise DataError(
            f"{path} line {text.count(chr(10), 0, at) + 1}: U+FFFD stands where a letter was: the file was once read "
            "in a wrong encoding and saved; fetch the original (PhraseBank comes in latin-1)."
        )


def _refuse_others(path: Path, content: bytes, text: str, used: str, is_utf8: bool) -> None:
    name = codecs.lookup(used).name
    if name == UTF8 or content.isascii():
        return
    if is_utf8:
        raise DataError(
            f"{path} is UTF-8, but would be read as {used}, which makes other letters of "
            f"{_sample(content)}; give --data.encoding utf-8."
        )
    control = next((i for i, letter in enumerate(text) if "\x80" <= letter <= "\x9f"), -1)
    if name == LATIN1 and control >= 0:
        raise DataError(
            f"{path} line {text.count(chr(10), 0, control) + 1}: 0x{ord(text[control]):02x} is no letter of latin-1; "
            "the file may be Windows' cp1252 or a Mac's mac-roman: give --data.encoding."
        )


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode(UTF8)
    except UnicodeDecodeError:
        return False
    return True


def _sample(content: bytes) -> str:
    """The first word that is not ASCII."""
    word = next(word for word in content.split() if not word.isascii())
    return repr(word.decode(UTF8))


def _line(content: bytes, start: int) -> int:
    return content.count(b"\n", 0, start) + 1


def _lines(text: str) -> str:
    return text.replace("\r\n", "\n")
