"""Which trials a sweep is made of: the points of its grid, each with its settings and a name that stays.

In pretraining, `quantization.bits` with `quantization.when: after` is no setting of training: points that
differ in it alone are one trial, trained once and scored at each of the bits.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from finhpc.errors import ConfigError
from finhpc.settings.base import build, put
from finhpc.settings.finetune import FinetuneConfig, TrainingConfig
from finhpc.settings.pretrain import PretrainConfig
from finhpc.settings.sweep import DISTRIBUTIONS, FinetuneSweepConfig, SweepConfig

BITS, WHEN = "quantization.bits", "quantization.when"
LONGEST_NAME = 100
Values = dict[str, Any]  # dotted key -> value
AnySweep = SweepConfig | FinetuneSweepConfig


@dataclass(frozen=True)
class Trial:
    """One training. `values`: what varies; `bits`: those of the trained weights that it is scored at."""

    name: str
    values: Values
    tree: dict[str, Any]  # its settings, nested
    bits: tuple[int, ...] = ()

    def config(self, **sections: dict[str, Any]) -> TrainingConfig:
        """Its settings, with keys of some sections put over them."""
        tree = self.tree | {name: self.tree.get(name, {}) | given for name, given in sections.items()}
        return build(FinetuneConfig, tree) if "lora" in tree else build(PretrainConfig, tree)

    @property
    def points(self) -> list[tuple[str, Values]]:
        """(name, values) of each point that its training serves."""
        if not self.bits:
            return [(self.name, self.values)]
        return [
            (self.name if bits == 16 else f"{self.name}-{bits}bit", self.values | {BITS: bits}) for bits in self.bits
        ]


def trials_of(config: AnySweep) -> list[Trial]:
    """Every trial, in the order of the grid; of an empty grid the one that nothing varies in."""
    base = config.model_dump(mode="json", exclude={"grid", "sweep"}, exclude_unset=True)
    if isinstance(config, FinetuneSweepConfig):
        base.setdefault("lora", {})
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
        Trial(name, own, tree, tuple(dict.fromkeys(bits)))
        for name, (own, tree, bits) in zip(names, trained.values(), strict=True)
    ]


def _trains_with_bits(config: AnySweep, values: Values) -> bool:
    if isinstance(config, FinetuneSweepConfig):
        return True
    return bool(values.get(WHEN, config.quantization.when) == "during" and values[BITS] != 16)


# -- points ---------------------------------------------------------------------------------


def _points(config: AnySweep) -> Iterator[Values]:
    """The product of the lists, and for each `sweep.samples` draws of what has a distribution."""
    lists = {key: values for key, values in config.grid.items() if isinstance(values, list)}
    drawn = {key: spec for key, spec in config.grid.items() if key not in lists}
    draw = random.Random(config.sweep.seed)
    for _ in range(config.sweep.samples if drawn else 1):
        for combination in itertools.product(*lists.values()):
            random_values = {key: _draw(spec, draw) for key, spec in drawn.items()}
            chosen = dict(zip(lists, combination, strict=True)) | random_values
            yield {key: chosen[key] for key in config.grid}


def _draw(spec: dict[str, Any], draw: random.Random) -> Any:
    (name, given), *_ = spec.items()
    return DISTRIBUTIONS[name][1](draw, *given)


# -- checks ---------------------------------------------------------------------------------


def check_points(config: AnySweep) -> None:
    """Raise `ConfigError` where the grid, whose keys and values are checked already, has no points or too many."""
    problems: list[str] = []
    if not config.grid:
        problems.append("grid is empty; say what varies, such as --grid 'method.rank=[8, 16]' (repeat for more keys).")
    counted = [spec for spec in config.grid.values() if isinstance(spec, list)]
    drawn = len(counted) < len(config.grid)
    if "samples" in config.sweep.model_fields_set and config.grid and not drawn:
        problems.append(
            f"sweep.samples={config.sweep.samples}, but no key of the grid has a distribution; leave it out."
        )
    number = math.prod(len(spec) for spec in counted) * (config.sweep.samples if drawn else 1)
    if number > config.sweep.max_trials:
        problems.append(
            f"the grid has {number:,} points, more than sweep.max_trials={config.sweep.max_trials:,}; take fewer "
            "values, draw keys at random (--grid 'KEY={choice: [...]}' with sweep.samples), or raise sweep.max_trials."
        )
    if problems:
        raise ConfigError(problems)


# -- names ----------------------------------------------------------------------------------


def _names(points: list[Values]) -> list[str]:
    """A readable name each, the same in every start; a hash makes those unique that would be long or equal."""
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
