"""A section of settings, and how defaults, YAML and flags become one: `load`."""

from __future__ import annotations

import difflib
import os
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from finhpc.errors import ConfigError


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True)


C = TypeVar("C", bound=Section)
TRUST = "trust_task_code"


def recipes() -> dict[str, Path]:
    """Named configs that ship with finhpc: name -> YAML file; a study's is studies/NAME, a scale's reproduce/NAME."""
    folder = Path(str(files("finhpc") / "recipes"))
    paths = [path for where in ("*", "studies/*", "reproduce/*") for path in sorted(folder.glob(f"{where}.yaml"))]
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths}


def load(cls: type[C], source: str | None, overrides: dict[str, Any] | None = None) -> C:
    """Resolve defaults < `source` (a recipe's name or a YAML file) < `overrides` ({"a.b": value}).

    Raises `ConfigError` with every unknown key and every bad value, and for a file that trusts code: settings and
    recipes are passed on, and whoever runs one must trust the code, not who wrote it.
    """
    tree = _read(source) if source else {}
    if _trusts(tree) and TRUST not in (overrides or {}):
        raise ConfigError(
            f"config={source} sets {TRUST}, which lets task files run code, and a file may not give that leave; read "
            f"the task files, then give --{TRUST} true on the command line, or take it out of {source}."
        )
    for dotted, value in (overrides or {}).items():
        put(tree, dotted, value)
    return build(cls, tree)


def _trusts(tree: Any) -> bool:
    """Whether settings, or those of a recipe's steps, let code run."""
    if isinstance(tree, dict):
        return bool(tree.get(TRUST)) or any(map(_trusts, tree.values()))
    return isinstance(tree, list) and any(map(_trusts, tree))


def build(cls: type[C], tree: dict[str, Any]) -> C:
    """Validate a nested dictionary; every problem in one `ConfigError`."""
    try:
        return cls.model_validate(_over_own_defaults(cls, tree))
    except ValidationError as error:
        raise ConfigError([_explain(cls, dict(item)) for item in error.errors()]) from None


def _over_own_defaults(cls: type[Section], tree: dict[str, Any]) -> dict[str, Any]:
    """`tree`, with a section given in part completed by what `cls` says of it, not by the section's class alone."""
    for name, field in cls.model_fields.items():
        given, kind = tree.get(name), field.annotation
        if isinstance(given, dict) and isinstance(kind, type) and issubclass(kind, Section):
            own: Section = field.get_default(call_default_factory=True)
            tree = tree | {name: own.model_dump(exclude_unset=True) | _over_own_defaults(kind, given)}
    return tree


def to_yaml(config: Section) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def keys(cls: type[Section], prefix: str = "") -> dict[str, Any]:
    """Dotted name -> field of every leaf setting."""
    found: dict[str, Any] = {}
    for name, field in cls.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            found |= keys(kind, f"{prefix}{name}.")
        else:
            found[prefix + name] = field
    return found


def flatten(config: Section) -> dict[str, Any]:
    """Dotted name -> value of every leaf setting."""
    flat: dict[str, Any] = {}
    for dotted in keys(type(config)):
        value: Any = config
        for part in dotted.split("."):
            value = getattr(value, part)
        flat[dotted] = value
    return flat


def nearest(name: str, valid: list[str]) -> str:
    """', nearest: X' for a mistyped name, or the whole list when nothing is near."""
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]}?"
    return f"valid: {', '.join(valid)}." if len(valid) <= 20 else "--help lists all."


def _read(source: str) -> dict[str, Any]:
    known = recipes()
    path = known.get(source, Path(source))
    if not path.is_file():
        if os.sep in source or source.endswith((".yaml", ".yml")):
            raise ConfigError(f"config={source} is not a file; give a YAML file or one of: {', '.join(known)}.")
        raise ConfigError(f"config={source} is no recipe; {nearest(source, list(known))}")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config={source} is not valid YAML: {error}; correct that line.") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"config={source} must hold sections (`model:`, `train:`, ...), not {type(tree).__name__}.")
    return tree


def put(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, leaf = dotted.split(".")
    for part in parents:
        inner = tree.setdefault(part, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{dotted}: {part} is a value, not a section; valid keys are in --help.")
        tree = inner
    tree[leaf] = value


def _explain(cls: type[Section], item: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"{where} is not a setting; {nearest(where, list(keys(cls)))}"
    field = keys(cls).get(where)
    hint = ""
    if item["type"] == "literal_error" and field is not None:
        near = difflib.get_close_matches(str(item["input"]), [str(a) for a in get_args(field.annotation)], n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
    elif field is not None and field.description:
        hint = f" ({where}: {field.description})"
    reason = item["msg"][0].lower() + item["msg"][1:]
    return f"{where}={item['input']!r} is refused: {reason}{hint}."
