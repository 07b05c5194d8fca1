"""The setting `data.labels`: the labels there are, or the meaning of each code that stands for one."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator

ABOUT = (
    "the labels (hawkish dovish neutral), or the label of each code (0=dovish 1=hawkish); default: those of the "
    "template, or of the data"
)


def _meaning(value: Any) -> Any:
    """A list of labels, or of CODE=LABEL, as a mapping from what stands in the data to the label."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list):
        words = [_word(item) for item in value]
        value = dict(((code.strip(), label) if equals else (code, code)) for code, equals, label in map(_parted, words))
        if len(value) < len(words):
            raise ValueError("a label or code is given twice; give each once")
    if not isinstance(value, dict):
        return value
    found = {_word(code): _word(label) for code, label in value.items()}
    if found and len({label.lower() for label in found.values()}) < 2:
        raise ValueError("at least two different labels are needed")
    return found


def _parted(word: str) -> tuple[str, str, str]:
    return word.partition("=")


def _word(value: Any) -> str:
    if isinstance(value, bool):
        raise ValueError("YAML reads yes, no, true and false as booleans; put labels in quotation marks")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int) or not str(value).strip():
        raise ValueError(f"{value!r} is not a label; write a word or a whole number")
    return " ".join(str(value).split())


Labels = Annotated[dict[str, str], BeforeValidator(_meaning)]
