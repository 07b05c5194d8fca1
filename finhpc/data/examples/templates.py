"""Prompt templates, listed in templates.yaml: they turn the fields of a record into a prompt and an answer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from finhpc.errors import ConfigError
from finhpc.plugins import Registry
from finhpc.settings.base import nearest
from finhpc.textfile import parse_yaml, read_yaml

LABELS = "labels"  # {labels} in a prompt: all labels, a/b/c
LABEL = "{label}"
FIELD = re.compile(r"\{(\w+)\}")
# A prompt that a file contains in full: its input, if it is marked, and the line that asks for the answer.
WRITTEN_INPUT = re.compile(r"\bInput:[ \t]*(.*?)\s*\n[^\n]{0,40}:\s*\Z", re.DOTALL)
LAST_LINE = re.compile(r"\n[^\n]{1,40}:\s*\Z")


class Rendered(NamedTuple):
    """A prompt. `cut`: its characters [start, stop) whose end may be cut; `key`: the input to split by."""

    prompt: str
    cut: tuple[int, int]
    key: str


class Template(BaseModel):
    """One entry of templates.yaml, which explains what its parts mean."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    prompt: str
    without_input: str | None = None
    answer: str
    separator: str = " "
    labels: tuple[str, ...] = ()
    end: bool = True
    key: str
    cut: str

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, parts: Any) -> Any:
        """Fill in what follows from the rest: the field that is cut and compared, and whether an end token follows."""
        names = _names(parts.get("prompt")) if isinstance(parts, dict) else []
        if not names:
            return parts
        cut = "input" if "input" in names else names[-1]
        return {"end": parts.get("answer") != LABEL, "cut": cut, "key": f"{{{parts.get('cut', cut)}}}"} | parts

    @model_validator(mode="after")
    def _check(self) -> Template:
        names = _names(self.prompt)
        if not names or "label" in names:
            raise ValueError("prompt must hold a field of the record in braces, such as {input}, and not {label}")
        if not _names(self.answer):
            raise ValueError("answer must hold a field in braces, such as {label}")
        if self.cut not in names:
            raise ValueError(f"cut must be a field of the prompt: {', '.join(names)}")
        if unknown := [name for name in _names(self.key) + _names(self.without_input) if name not in self.fields]:
            raise ValueError(f"{unknown[0]} is not a field of prompt and answer: {', '.join(self.fields)}")
        if self.labels and len({label.strip().lower() for label in self.labels} - {""}) < max(2, len(self.labels)):
            raise ValueError("labels must be at least two different labels")
        if self.labels and not self.chooses:
            raise ValueError(f"a template with labels has the answer {LABEL}")
        if self.chooses and self.end:
            raise ValueError("labels are chosen by log-likelihood, without an end token: end must be false")
        return self

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields in the prompt and the answer."""
        return tuple(dict.fromkeys(_names(self.prompt) + _names(self.answer)))

    @property
    def chooses(self) -> bool:
        """Whether the answer is one of a few labels, not text."""
        return self.answer == LABEL

    def with_labels(self, labels: tuple[str, ...]) -> Template:
        """The same template for other labels."""
        return self.model_copy(update={"labels": labels})

    def render(self, fields: Mapping[str, str]) -> Rendered:
        """Return the prompt of a record; white space at its end belongs to the answer."""
        short = self.without_input is not None and not fields.get("input", "").strip()
        pattern = self.without_input if short and self.without_input else self.prompt
        fields = {**fields, LABELS: "/".join(self.labels)}
        cut = self.cut if f"{{{self.cut}}}" in pattern else _names(pattern)[-1]
        text, start, stop, last = "", 0, 0, 0
        for found in FIELD.finditer(pattern):
            text += pattern[last : found.start()]
            if found[1] == cut:
                start, stop = len(text), len(text) + len(fields[cut])
            text += fields[found[1]]
            last = found.end()
        text = (text + pattern[last:]).rstrip()
        key = _fill(self.key, fields)
        if (written := WRITTEN_INPUT.search(key)) is not None:
            key = written[1]
        if pattern == f"{{{cut}}}":
            if (written := WRITTEN_INPUT.search(text)) is not None:
                start, stop = written.span(1)
            elif (asks := LAST_LINE.search(text)) is not None:
                stop = asks.start()
        return Rendered(text, (start, min(stop, len(text))), key)

    def answer_of(self, fields: Mapping[str, str]) -> str:
        """Return the answer that the model learns, without white space around it."""
        return _fill(self.answer, fields).strip()


@cache
def _shipped() -> dict[str, Template]:
    tree = parse_yaml((files("finhpc.data.examples") / "templates.yaml").read_text(encoding="utf-8"))
    return {name: Template(name=name, **parts) for name, parts in tree.items()}


def _check_template(name: str, template: object) -> None:
    if not isinstance(template, Template) or name in _shipped() or template.name != name:
        raise ConfigError(
            f"data.template={name} must be a finhpc.data.examples.templates.Template of that name, and a new one."
        )


TEMPLATES: Registry[Template] = Registry("data.template", {}, _check_template)  # those of plugins


def templates(file: str | None = None) -> dict[str, Template]:
    """Return all templates by name: finhpc's, plugins', and those in a YAML file of the user's.

    Raises one `ConfigError` with everything that is wrong in the file.
    """
    if file is None:
        return _shipped() | dict(TEMPLATES)
    path = Path(file).expanduser()
    if not path.is_file():
        raise ConfigError(f"data.templates={file} is not a file; give a YAML file of templates.")
    tree = read_yaml(path, f"data.templates={file}")
    if not isinstance(tree, dict) or not tree:
        raise ConfigError(f"data.templates={file} has no template; write NAME: {{prompt: ..., answer: ...}}.")
    found: dict[str, Template] = {}
    problems: list[str] = []
    for name, parts in tree.items():
        try:
            found[str(name)] = _own(str(name), parts)
        except ConfigError as error:
            problems += [f"data.templates={file}: template {name}: {problem}" for problem in error.problems]
    if problems:
        raise ConfigError(problems)
    return _shipped() | dict(TEMPLATES) | found


def _own(name: str, parts: Any) -> Template:
    """Return a template of the user's, checked."""
    if name in _shipped() or name in TEMPLATES:
        raise ConfigError("finhpc or a plugin has a template of that name; choose another.")
    if not isinstance(parts, dict):
        raise ConfigError("it must hold prompt and answer, such as {prompt: ..., answer: ...}.")
    if "name" in parts:
        raise ConfigError("name is not a part of a template; its name is its key.")
    try:
        return Template(**{"name": name, **parts})
    except ValidationError as error:
        raise ConfigError(list(dict.fromkeys(_problem(dict(item)) for item in error.errors()))) from None


def _problem(item: dict[str, Any]) -> str:
    part = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"{part} is not a part; {nearest(part, [name for name in Template.model_fields if name != 'name'])}"
    if item["type"] == "missing" and part in ("cut", "key"):  # they follow from the prompt
        return "prompt must hold a field of the record in braces, such as {input}."
    if item["type"] == "missing":
        return f"{part} is missing; write it."
    reason = item["msg"].removeprefix("Value error, ")
    value = f"{part}={item['input']!r}: " if part else ""
    quotes = " (YAML reads yes, no, on and off as booleans: put them in quotation marks)"
    return f"{value}{reason}{quotes if isinstance(item['input'], bool) else ''}."


def template(name: str, file: str | None = None) -> Template:
    """Return a template by its name. Raises `ConfigError` with the nearest name if there is none."""
    known = templates(file)
    if name not in known:
        raise ConfigError(f"data.template={name} is not a template; {nearest(name, list(known))}")
    return known[name]


def listing(file: str | None = None) -> str:
    """Return a text with the name, fields, labels and prompt of each template."""
    lines: list[str] = []
    for name, entry in templates(file).items():
        labels = f"; labels: {', '.join(entry.labels) or 'those of the data'}" if entry.chooses else ""
        lines += [f"{name}: fields {', '.join(entry.fields)}{labels}"]
        lines += [f"    {line}".rstrip() for line in f"{entry.prompt}{entry.separator}{entry.answer}".split("\n")]
    return "\n".join(lines)


def _names(pattern: Any) -> list[str]:
    """Return the fields of a record in a pattern."""
    return [name for name in FIELD.findall(pattern or "") if name != LABELS] if isinstance(pattern, str | None) else []


def _fill(pattern: str, fields: Mapping[str, str]) -> str:
    return FIELD.sub(lambda found: fields[found[1]], pattern)
