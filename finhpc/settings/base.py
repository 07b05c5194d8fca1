"""Sections of settings, and `load`, which makes one of defaults, YAML and flags."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeGuard, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from finhpc import plugins
from finhpc.errors import ConfigError, collect
from finhpc.textfile import read_yaml

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)


class _SectionType(ModelMetaclass):
    """Makes `PretrainConfig(...)` in Python accept and refuse the same as `build` for a YAML file."""

    if not TYPE_CHECKING:

        def __call__(cls, **given: Any) -> Any:
            try:
                return super().__call__(**_over_own_defaults(cls, given))
            except ValidationError as error:
                raise ConfigError(_explained(cls, error)) from None


class Section(BaseModel, metaclass=_SectionType):
    """Settings under one name. A wrong key or value raises `ConfigError`, at creation and at assignment."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)

    if not TYPE_CHECKING:

        def __setattr__(self, name: str, value: Any) -> None:
            if name not in type(self).model_fields:
                raise ConfigError(f"{name} is not a setting; {nearest(name, list(type(self).model_fields))}")
            try:
                super().__setattr__(name, value)
            except ValidationError as error:
                raise ConfigError(_explained(type(self), error)) from None


C = TypeVar("C", bound=Section)
# `json_schema_extra` of a setting, or of the class of a section, that may change when a run is resumed. All others
# define the run and must stay the same.
MAY_CHANGE: dict[str, Any] = {"may_change": True}
TRUST = "trust_task_code"
Plugins = Annotated[list[str], AfterValidator(plugins.load)]  # imported as soon as the settings are created


# Paths become absolute as soon as the settings are created: workers and reruns have other working directories.


def absolute_path(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path)) if path else path


def _absolute_if_exists(path: str) -> str:
    return absolute_path(path) if os.path.exists(os.path.expanduser(path)) else path


def _absolute_source(source: str) -> str:
    if not source.startswith("hf:"):
        return absolute_path(source)
    name, colon, configuration = source.removeprefix("hf:").partition(":")
    return f"hf:{absolute_path(name)}{colon}{configuration}" if os.path.isdir(name) else source


LocalPath = Annotated[str, AfterValidator(absolute_path)]
ModelPath = Annotated[str, AfterValidator(_absolute_if_exists)]  # a folder, or the name of a model on the hub
Source = Annotated[str, AfterValidator(_absolute_source)]


def plugins_field() -> Any:
    """Return the setting `plugins`, which every command has that runs code of a plugin."""
    return Field(
        default_factory=list,
        description="modules that register your own low-rank layers, optimizers, model families, shapes or templates",
    )


def recipes() -> dict[str, Path]:
    """Return the recipes in the package, name -> YAML file. Those of studies are called studies/NAME."""
    folder = Path(str(files("finhpc") / "recipes"))
    paths = [path for where in ("*", "studies/*", "reproduce/*") for path in sorted(folder.glob(f"{where}.yaml"))]
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths}


def load(
    cls: type[C], source: str | None, overrides: Mapping[str, Any] | None = None, problems: Sequence[str] = ()
) -> C:
    """Resolve defaults < `source` (a recipe's name or a YAML file) < `overrides` ({"a.b": value} or sections).

    Raises `ConfigError` with `problems` and every unknown key and bad value. A file must not allow task files to run
    code: settings and recipes are passed on, and whoever runs them has to trust that code.
    """
    problems = list(problems)
    tree: dict[str, Any] = {}
    with collect(problems):
        tree = _read(source) if source else {}
    if _trusts(tree) and TRUST not in (overrides or {}):
        problems.append(
            f"config={source} sets {TRUST}, which lets task files run code; a file cannot give that permission. Read "
            f"the task files, then give --{TRUST} true on the command line, or remove it from {source}."
        )
    for dotted, value in _leaves(cls, overrides or {}):
        with collect(problems):
            put(tree, dotted, value)
    with collect(problems):
        settings = build(cls, tree)
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return settings


def _leaves(cls: type[Section], overrides: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of settings that may be grouped into sections."""
    sections = {path for path, field in _fields(cls) if _is_section(field.annotation)}

    def leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, Section):
            value = value.model_dump(exclude_unset=True)
        if name not in sections or not isinstance(value, Mapping):
            yield name, value
            return
        for key, inner in value.items():
            yield from leaves(f"{name}.{key}", inner)

    for name, value in overrides.items():
        yield from leaves(name, value)


def _is_section(kind: Any) -> TypeGuard[type[Section]]:
    return isinstance(kind, type) and issubclass(kind, Section)


def _trusts(tree: Any) -> bool:
    """Whether settings, or those of a step in a recipe, allow task files to run code."""
    if isinstance(tree, dict):
        return bool(tree.get(TRUST)) or any(map(_trusts, tree.values()))
    return isinstance(tree, list) and any(map(_trusts, tree))


def build(cls: type[C], tree: dict[str, Any]) -> C:
    """Validate a nested dictionary; raises one `ConfigError` with every problem."""
    try:
        return cls.model_validate(_over_own_defaults(cls, tree))
    except ValidationError as error:
        raise ConfigError(_explained(cls, error)) from None


def _over_own_defaults(cls: type[Section], tree: dict[str, Any]) -> dict[str, Any]:
    """Complete each section of `tree` with the defaults that it has in `cls`, which may differ from its class's."""
    for name, field in cls.model_fields.items():
        given, kind = tree.get(name), field.annotation
        if not _is_section(kind) or name not in tree:
            continue
        if given is None:  # an empty section of a YAML file
            tree = {key: value for key, value in tree.items() if key != name}
            continue
        if not isinstance(given, dict | Section):
            continue
        own = field.get_default(call_default_factory=True).model_dump(exclude_unset=True)
        if isinstance(given, dict):
            tree = tree | {name: own | _over_own_defaults(kind, given)}
        elif own:  # an object created in Python
            tree = tree | {name: own | given.model_dump(exclude_unset=True)}
    return tree


def to_yaml(config: Section) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def keys(cls: type[Section]) -> dict[str, Any]:
    """Return dotted name -> field of every setting."""
    return {name: field for name, field in _fields(cls) if not _is_section(field.annotation)}


def defaults(cls: type[Section], source: str | None = None) -> dict[str, str]:
    """Return dotted name -> value without flags, as help shows it, over a recipe or YAML file `source`.

    A field whose default is only known later describes it in `json_schema_extra`, as "default".
    """
    later, given = marked(cls, "default"), dict(_leaves(cls, _read(source) if source else {}))
    return {
        name: str(later[name]) if name in later and name not in given else _as_flag(value)
        for name, value in flatten(load(cls, source)).items()
    }


def marked(cls: type[Section], mark: str) -> dict[str, Any]:
    """Return dotted name -> the value of `mark` in `json_schema_extra` of the setting or a section around it."""
    marks: dict[str, Any] = {}
    for path, field in _fields(cls):
        section: Any = field.annotation
        extra: Any = field.json_schema_extra or {}
        if _is_section(section):
            of_section: Any = section.model_config.get("json_schema_extra") or {}
            extra = {**of_section, **extra}
        if mark in extra:
            marks |= {name: extra[mark] for name in keys(cls) if f"{name}.".startswith(f"{path}.")}
    return marks


def _fields(cls: type[Section], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, field) of every section and setting."""
    for name, field in cls.model_fields.items():
        yield prefix + name, field
        if _is_section(field.annotation):
            yield from _fields(field.annotation, f"{prefix}{name}.")


def _as_flag(value: Any) -> str:
    """Write a value as on the command line."""
    if value is None or value in ("", [], {}):
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and value.startswith(f"{os.getcwd()}{os.sep}"):
        return os.path.relpath(value)
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def flatten(config: Section) -> dict[str, Any]:
    """Return dotted name -> value of every setting."""
    return {dotted: attrgetter(dotted)(config) for dotted in keys(type(config))}


def nearest(name: str, valid: list[str], most: int = 20) -> str:
    """Return a hint for a mistyped name: the nearest valid name, or all of them if there are at most `most`."""
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"valid: {', '.join(valid)}." if len(valid) <= most else "--help lists all."


def _read(source: str) -> dict[str, Any]:
    known = recipes()
    path = known.get(source, Path(source))
    if not path.is_file():
        if os.sep in source or source.endswith((".yaml", ".yml")):
            raise ConfigError(f"config={source} is not a file; give a YAML file or one of: {', '.join(known)}.")
        raise ConfigError(f"config={source} is not a recipe; {nearest(source, list(known), most=100)}")
    tree = read_yaml(path, f"config={source}")
    if not isinstance(tree, dict):
        raise ConfigError(
            f"config={source} must contain sections (`model:`, `train:`, ...), not {type(tree).__name__}."
        )
    return tree


def put(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, leaf = dotted.split(".")
    for part in parents:
        inner = tree.setdefault(part, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{dotted}: {part} is a value, not a section; valid keys are in --help.")
        tree = inner
    tree[leaf] = value


class ProblemsError(ValueError):
    """Raised by the validator of a field; each problem becomes a line of the `ConfigError`."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


def _explained(cls: type[Section], error: ValidationError) -> list[str]:
    problems: list[str] = []
    for item in error.errors():
        cause = item.get("ctx", {}).get("error")
        problems += cause.problems if isinstance(cause, ProblemsError) else [_explain(cls, dict(item))]
    return problems


def _explain(cls: type[Section], item: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden" and where in keys(cls):
        return (
            f"{where} is written with a dot, as on the command line; in YAML and Python make it a key of its section."
        )
    if item["type"] == "extra_forbidden":
        return f"{where} is not a setting; {nearest(where, [name for name, _ in _fields(cls)])}"
    field = keys(cls).get(where) or keys(cls).get(where.rpartition(".")[0])  # of an item in a list
    hint = ""
    if item["type"] == "literal_error" and field is not None:
        near = difflib.get_close_matches(str(item["input"]), [str(a) for a in get_args(field.annotation)], n=1)
        hint = f" (did you mean '{near[0]}'?)" if near else ""
    elif field is not None and field.description:
        hint = f" ({where}: {field.description})"
    reason = item["msg"][0].lower() + item["msg"][1:]
    if item["type"] == "list_type" and not isinstance(item["input"], dict):
        reason += f", such as [{item['input']}]"
    return f"{where}={item['input']!r} is refused: {reason}{hint}."
