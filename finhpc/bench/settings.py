"""What each `finhpc bench NAME` can be told."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from finhpc.config import Section


class Bench(Section):
    """How a measurement is repeated and where it is kept."""

    repeats: int = Field(5, ge=1, description="pairs measured, in turn; ratios are medians over pairs")
    out: str = Field("runs/bench", description="folder of the measurements: one folder each, with result.json")


BENCHES: dict[str, tuple[type[Section], str]] = {}
"""Name -> its settings and the function that measures, as `module:function`."""


def function_of(name: str) -> Any:
    """The measuring function of a bench, imported only now. It takes the settings and returns the result."""
    from importlib import import_module

    module, _, function = BENCHES[name][1].partition(":")
    return getattr(import_module(module), function)
