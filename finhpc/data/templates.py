"""Named prompt templates: a record's fields in, prompt and answer out. They stand in templates.yaml."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict

from finhpc.config import nearest
from finhpc.errors import ConfigError
from finhpc.plugins import Registry

FIELD = re.compile(r"\{(\w+)\}")
# A prompt that was written out by others: its input, if it is told apart, and the line that asks for the answer.
WRITTEN_INPUT = re.compile(r"\bInput:[ \t]*(.*?)\s*\n[^\n]{0,40}:\s*\Z", re.DOTALL)
LAST_LINE = re.compile(r"\n[^\n]{1,40}:\s*\Z")


class Rendered(NamedTuple):
    """A prompt; `cut` is the part of it, as characters [start, stop), whose end is cut where it is too long."""

    prompt: str
    cut: tuple[int, int]
    key: str


class Template(BaseModel):
    """One entry of templates.yaml; what its parts mean is said there."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    prompt: str
    without_input: str | None = None
    answer: str
    separator: str
    labels: tuple[str, ...] = ()
    end: bool
    key: str
    cut: str

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields that the prompt and the answer are made of."""
        return tuple(dict.fromkeys(FIELD.findall(self.prompt) + FIELD.findall(self.answer)))

    def render(self, fields: Mapping[str, str]) -> Rendered:
        """The prompt of a record, with white space at its end left to the answer."""
        short = self.without_input is not None and not fields.get("input", "").strip()
        pattern = self.without_input if short and self.without_input else self.prompt
        cut = self.cut if f"{{{self.cut}}}" in pattern else FIELD.findall(pattern)[-1]
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
        """What the model learns to say, without white space around it."""
        return _fill(self.answer, fields).strip()


def templates() -> dict[str, Template]:
    """All templates by name: those of templates.yaml and those of plugins."""
    return _own() | dict(TEMPLATES)


def _check_template(name: str, template: object) -> None:
    if not isinstance(template, Template) or name in _own() or template.name != name:
        raise ConfigError(f"data.template={name} must be a finhpc.data.templates.Template of that name, and a new one.")


@cache
def _own() -> dict[str, Template]:
    tree = yaml.safe_load((files("finhpc.data") / "templates.yaml").read_text(encoding="utf-8"))
    return {name: Template(name=name, **parts) for name, parts in tree.items()}


TEMPLATES: Registry[Template] = Registry("data.template", {}, _check_template)  # those of plugins


def template(name: str) -> Template:
    """A template by its name; raises `ConfigError` with the nearest name where there is none."""
    if name not in templates():
        raise ConfigError(f"data.template={name} is no template; {nearest(name, list(templates()))}")
    return templates()[name]


def _fill(pattern: str, fields: Mapping[str, str]) -> str:
    return FIELD.sub(lambda found: fields[found[1]], pattern)
