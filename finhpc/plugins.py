"""Plugins: low-rank layers, optimizers, model families, shapes and prompt templates from outside finhpc.

A plugin is a module that registers parts when it is imported:

    from finhpc.lowrank.layers import LowRankLinear
    from finhpc.lowrank.registry import LAYERS

    @LAYERS.register("gelu")
    class GeluLinear(LowRankLinear): ...

An installed package declares its module as an entry point of the group `finhpc.plugins`; every process imports it. Any
other module is named in the setting `plugins`; the command and its workers import it first. A plugin of an installed
package may also add commands: `COMMANDS["hello"] = Command(...)` of `finhpc.commands`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, TypeVar

from finhpc.errors import ConfigError

GROUP = "finhpc.plugins"
T = TypeVar("T")
_loaded: list[str] = []  # modules of plugins, in the order of their import
_importing: list[str] = []


def load(modules: Iterable[str]) -> list[str]:
    """Import plugins by module name, also from the current folder; raises `ConfigError` if a worker could not."""
    names, problems = list(modules), []
    if names and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    for name in names:
        if name in _loaded:
            continue
        try:
            _import(name)
            if not _is_importable(name.partition(".")[0]):
                _loaded.remove(name)
                raise ConfigError(
                    f"plugins={name} was imported from {sys.modules[name].__file__}, where workers do not look; "
                    "install it, put it into the current folder, or put its folder into PYTHONPATH."
                )
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return names


def enter(modules: Iterable[str]) -> None:
    """Import the plugins of the driver in a worker."""
    for name in modules:
        if name not in _loaded:
            _import(name)


@cache
def load_installed() -> None:
    """Import the plugins of installed packages, once per process."""
    for point in entry_points(group=GROUP):
        if point.module not in _loaded:
            _import(point.module)


def loaded() -> tuple[str, ...]:
    """Return the modules of all plugins of this process."""
    load_installed()
    return tuple(_loaded)


def require(modules: Iterable[str], what: str) -> None:
    """Raise `ConfigError` unless these plugins, which `what` needs, are imported in this process."""
    missing = [name for name in modules if name not in loaded() and name not in sys.modules]
    if missing:
        raise ConfigError(
            f"{what} needs the plugin {', '.join(missing)}, which is not imported here; install its package, "
            f"or give --plugins {' '.join(missing)} (in Python: import {missing[0]})."
        )


def _import(name: str) -> None:
    _importing.append(name)
    try:
        import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise ConfigError(
                f"plugins={name} is not a module that can be imported; give a module of an installed package, in the "
                "current folder or on PYTHONPATH (my_layers for my_layers.py)."
            ) from None
        raise ConfigError(f"plugins={name} cannot be imported: {error}; install what it needs.") from None
    except ConfigError:
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise ConfigError(
            f"plugins={name} cannot be imported: {type(error).__name__}: {error} ({frame.filename} line "
            f"{frame.lineno}); correct it."
        ) from None
    finally:
        _importing.pop()
    _loaded.append(name)


def _is_importable(top: str) -> bool:
    """Whether a new process, such as a worker, finds a module; it also looks in the current folder."""
    code = "import importlib.util, sys; sys.path.insert(0, ''); sys.exit(importlib.util.find_spec(sys.argv[1]) is None)"
    return subprocess.run([sys.executable, "-c", code, top], capture_output=True).returncode == 0


class Registry(Mapping[str, T]):
    """Named parts of one kind: those of finhpc and those of plugins.

    `setting` is the setting whose values are the names. `check` raises `ConfigError` for an unusable part.
    """

    def __init__(self, setting: str, own: Mapping[str, T], check: Callable[[str, Any], None]) -> None:
        self.setting, self.check = setting, check
        self._parts: dict[str, T] = dict(own)
        self._origins: dict[str, str] = {}  # name -> module, of the parts of plugins

    def register(self, name: str, part: T | None = None) -> Any:
        """Add a part under a new name; without `part`, return a decorator for it."""
        module = _importing[-1] if _importing else str(sys._getframe(1).f_globals.get("__name__"))

        def add(part: T) -> T:
            if name in self._parts and self._origins.get(name) != module:
                by = self._origins.get(name, "finhpc")
                raise ConfigError(f"{self.setting}={name} is already registered by {by}; choose another name.")
            self.check(name, part)
            self._parts[name] = part
            self._origins[name] = module
            return part

        return add if part is None else add(part)

    def own(self) -> Iterator[tuple[str, T]]:
        """Return the parts of finhpc by name, without importing plugins."""
        return iter((name, part) for name, part in self._parts.items() if name not in self._origins)

    def origin(self, name: str) -> str | None:
        """Return the module of the plugin that registered a part; None for a part of finhpc."""
        return self._origins.get(name)

    def check_workers_see(self, name: str) -> None:
        """Raise `ConfigError` for a part that is registered in this process only."""
        origin = self.origin(name)
        if origin is None or any(origin == plugin or origin.startswith(f"{plugin}.") for plugin in loaded()):
            return
        remedy = f"add it to plugins: --plugins {origin}"
        if origin == "__main__":
            remedy = "put it into a module, such as my_parts.py in the current folder, and give --plugins my_parts"
        raise ConfigError(
            f"{self.setting}={name} was registered by {origin} in this process, which workers do not import; {remedy} "
            '(in Python: plugins=["..."]).'
        )

    def __getitem__(self, name: str) -> T:
        if name not in self._parts:
            load_installed()
        return self._parts[name]

    def __setitem__(self, name: str, part: T) -> None:
        raise ConfigError(
            f"{self.setting}={name} must be added by .register({name!r}, ...), so that workers can do the same."
        )

    def __iter__(self) -> Iterator[str]:
        load_installed()
        return iter(self._parts)

    def __len__(self) -> int:
        return len(list(iter(self)))
