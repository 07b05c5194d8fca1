"""Side-by-side measurements: finhpc against the fastest plain way to do the same work, in one call.

The package is called like a function, `finhpc.bench(settings)`, as every command is in Python.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


def bench(settings: Any, dry_run: bool = False) -> dict[str, Any]:
    """Measure what `settings` (of `finhpc.bench.settings`, such as `TrainBench`) asks for; returns result.json.

    Raises `ConfigError` for settings that cannot work, and for `dry_run`: nothing is counted that is not measured.
    """
    from finhpc.bench.settings import BENCHES, function_of
    from finhpc.errors import ConfigError

    name = next((name for name, (kind, _) in BENCHES.items() if type(settings) is kind), None)
    if name is None:
        kinds = ", ".join(kind.__name__ for kind, _ in BENCHES.values())
        raise ConfigError(f"bench takes settings of finhpc.bench.settings ({kinds}), not {type(settings).__name__}.")
    if dry_run:
        raise ConfigError(
            f"bench {name} has no --dry_run, because it only measures; leave it out, or use --print_config to see what "
            "it would measure."
        )
    result: dict[str, Any] = function_of(name)(settings)
    return result


class _Callable(ModuleType):
    def __call__(self, settings: Any, dry_run: bool = False) -> dict[str, Any]:
        return bench(settings, dry_run)


sys.modules[__name__].__class__ = _Callable
