"""The trials of a sweep: the points of its grid, each with its settings and a stable name.

In pretraining, `quantization.bits` with `quantization.when: after` does not change the training: points that differ
in it alone are one trial, trained once and scored at each of the bits.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
import re
from collections.abc import Iterator
from typing import Any

from finhpc.commands.sweep.trial import BITS, Trial, Values
from finhpc.errors import ConfigError
from finhpc.settings.base import put
from finhpc.settings.finetune import FinetuneConfig
from finhpc.settings.pretrain import PretrainConfig
from finhpc.settings.sweep import DISTRIBUTIONS, FinetuneSweepConfig, SweepConfig

WHEN = "quantization.when"
LONGEST_NAME = 100
AnySweep = SweepConfig | FinetuneSweepConfig


def trials_of(config: AnySweep) -> list[Trial]:
    """Every trial, in the order of the grid; an empty grid gives one trial in which nothing varies."""
    base = config.model_dump(mode="json", exclude={"grid", "sweep"}, exclude_unset=True)
    settings = FinetuneConfig if isinstance(config, FinetuneSweepConfig) else PretrainConfig
    trained: dict[str, tuple[Values, dict[str, Any], list[int]]] = {}
    for values in _points(config):
        own = {key: value for key, value in values.items() if key != BITS or _trains_with_bits(config, values)}
        tree: dict[str, Any] = json.loads(json.dumps(base))
        for key, value in own.items():
            put(tree, key, value)
        if BITS in values and BITS not in own:
            tree.get("quantization", {}).pop("bits", None)
        _, _, bits = trained.setdefault(json.dumps(own, sort_keys=True), (own, tree, []))
        if BITS in values and BITS not in own:
            bits.append(values[BITS])
    names = _names([own for own, _, _ in trained.values()])
    return [
        Trial(name, own, settings, tree, tuple(dict.fromkeys(bits)))
        for name, (own, tree, bits) in zip(names, trained.values(), strict=True)
    ]


def _trains_with_bits(config: AnySweep, values: Values) -> bool:
    if isinstance(config, FinetuneSweepConfig):
        return True
    return bool(values.get(WHEN, config.quantization.when) == "during" and values[BITS] != 16)


def _points(config: AnySweep) -> Iterator[Values]:
    """The product of all lists, with `sweep.samples` draws of the keys that have a distribution."""
    lists = {key: values for key, values in config.grid.items() if isinstance(values, list)}
    drawn = {key: spec for key, spec in config.grid.items() if key not in lists}
    draw = random.Random(config.sweep.seed)
    for _ in range(config.sweep.samples if drawn else 1):
        for combination in itertools.product(*lists.values()):
            values = dict(zip(lists, combination, strict=True))
            for key, spec in drawn.items():
                ((distribution, bounds),) = spec.items()
                values[key] = DISTRIBUTIONS[distribution][1](draw, *bounds)
            yield {key: values[key] for key in config.grid}


def check_points(config: AnySweep) -> None:
    """Raise `ConfigError` if the grid, whose keys and values are valid already, has no points or too many."""
    problems: list[str] = []
    if not config.grid:
        problems.append("grid is empty; say what varies, such as --grid 'method.rank=[8, 16]' (repeat for more keys).")
    lists = [spec for spec in config.grid.values() if isinstance(spec, list)]
    draws = len(lists) < len(config.grid)
    if "samples" in config.sweep.model_fields_set and config.grid and not draws:
        problems.append(
            f"sweep.samples={config.sweep.samples}, but no key of the grid has a distribution; leave it out."
        )
    number = math.prod(len(spec) for spec in lists) * (config.sweep.samples if draws else 1)
    if number > config.sweep.max_trials:
        problems.append(
            f"the grid has {number:,} points, more than sweep.max_trials={config.sweep.max_trials:,}; take fewer "
            "values, draw keys at random (--grid 'KEY={choice: [...]}' with sweep.samples), or raise sweep.max_trials."
        )
    if problems:
        raise ConfigError(problems)


def _names(points: list[Values]) -> list[str]:
    """A readable name for each point, the same in every start; a hash shortens long names and separates equal ones."""
    names = [_name(values) for values in points]
    return [
        name
        if len(name) <= LONGEST_NAME and names.count(name) == 1
        else f"{name[:LONGEST_NAME]}-{hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]}"
        for name, values in zip(names, points, strict=True)
    ]


def _name(values: Values) -> str:
    if not values:
        return "only"
    leaves = [key.rpartition(".")[2] for key in values]
    parts = []
    for key, value in sorted(values.items()):
        leaf = key.rpartition(".")[2]
        title = leaf if leaves.count(leaf) == 1 else key
        text = f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else f"-{value}"
        parts.append(f"{title}{text}")
    return re.sub(r"[^A-Za-z0-9._-]+", "_", "-".join(parts)).strip("_.-")
