"""What varies in a sweep: lists of values and distributions, checked with all other settings."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

from finhpc.errors import ConfigError
from finhpc.settings.base import ProblemsError, Section, build, keys, nearest, put


def check_grid(cls: type[Section], grid: dict[str, Any]) -> dict[str, Any]:
    """The grid, once its keys are settings of `cls` and have values; raises `ProblemsError` with every problem."""
    fields = keys(cls)
    problems: list[str] = []
    for key, spec in grid.items():
        if key not in fields and key.rpartition(".")[0] not in fields:
            problems.append(f"grid: {key} is not a setting; {nearest(key, list(fields))}")
        elif key.startswith("run."):
            problems.append(f"grid: {key} cannot vary; the sweep names and places its runs itself.")
        else:
            problems += _refused(cls, key, spec)
        problems += [f"grid: {key}={spec!r} {problem}" for problem in _problems_of(spec)]
    if problems:
        raise ProblemsError(problems)
    return grid


def _refused(cls: type[Section], key: str, spec: Any) -> list[str]:
    """Values of a list that the setting does not take, each in the words for a single one."""
    found: list[str] = []
    for value in spec if isinstance(spec, list) else []:
        tree: dict[str, Any] = {}
        put(tree, key, value)
        try:
            build(cls, tree)
        except ConfigError as error:
            found += [f"grid: {problem}" for problem in error.problems if problem.startswith(f"{key}=")]
    return found


def _problems_of(spec: Any) -> Iterator[str]:
    """What is wrong with one key's values."""
    known = ", ".join(f"{name}: {takes}" for name, (takes, _) in DISTRIBUTIONS.items())
    if isinstance(spec, list):
        if not spec:
            yield "has no values; give at least one, or leave the key out."
        elif len({json.dumps(value) for value in spec}) < len(spec):
            yield "names a value twice; give each once."
        return
    if not isinstance(spec, dict) or len(spec) != 1 or next(iter(spec)) not in DISTRIBUTIONS:
        yield f"is neither a list of values nor one distribution; give KEY=[VALUES], or KEY={{NAME: ...}} with {known}."
        return
    (name, given), *_ = spec.items()
    bad = not isinstance(given, list) or not given
    if not bad and name != "choice":
        bad = len(given) != 2 or not all(isinstance(x, int | float) and math.isfinite(x) for x in given)
        bad = bad or given[0] >= given[1] or (name == "log_uniform" and given[0] <= 0)
        bad = bad or (name == "randint" and not all(isinstance(x, int) for x in given))
    if bad:
        yield f"does not bound its draws; {name} takes {DISTRIBUTIONS[name][0]}."


def _log_uniform(draw: random.Random, low: float, high: float) -> float:
    return float(f"{math.exp(draw.uniform(math.log(low), math.log(high))):.4g}")


# name -> (what it takes, a draw)
DISTRIBUTIONS: dict[str, tuple[str, Callable[..., Any]]] = {
    "uniform": ("[LOW, HIGH]", lambda draw, low, high: float(f"{draw.uniform(low, high):.4g}")),
    "log_uniform": ("[LOW, HIGH], both above 0", _log_uniform),
    "randint": ("[LOW, HIGH], both whole and possible", lambda draw, low, high: draw.randint(low, high)),
    "choice": ("[VALUE, ...]", lambda draw, *values: draw.choice(values)),
}
