"""Settings of `finhpc sweep`, `finhpc sweep finetune` and `finhpc study`: one run's settings, and what varies."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from finhpc.errors import ConfigError
from finhpc.settings.base import MAY_CHANGE, ProblemsError, Section, build, keys, nearest, put
from finhpc.settings.finetune import FinetuneConfig
from finhpc.settings.pretrain import PretrainConfig
from finhpc.settings.training import Run

GRID = (
    "KEY=[VALUES], a trial per combination; or KEY={uniform: [LOW, HIGH]}, log_uniform, randint or choice: "
    "sweep.samples random values"
)


def check_grid(cls: type[Section], grid: dict[str, Any]) -> dict[str, Any]:
    """Return the grid; raises `ProblemsError` with every key that is not a setting of `cls` and every bad value."""
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
    """Problems of the values in a list, each reported as for a single value."""
    problems: list[str] = []
    for value in spec if isinstance(spec, list) else []:
        tree: dict[str, Any] = {}
        put(tree, key, value)
        try:
            build(cls, tree)
        except ConfigError as error:
            problems += [f"grid: {problem}" for problem in error.problems if problem.startswith(f"{key}=")]
    return problems


def _problems_of(spec: Any) -> Iterator[str]:
    """Problems of the values of one key."""
    known = ", ".join(f"{name}: {takes}" for name, (takes, _) in DISTRIBUTIONS.items())
    if isinstance(spec, list):
        if not spec:
            yield "has no values; give at least one, or remove the key."
        elif len({json.dumps(value) for value in spec}) < len(spec):
            yield "contains a value twice; give each once."
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
        yield f"has no usable bounds; {name} takes {DISTRIBUTIONS[name][0]}."


def _log_uniform(draw: random.Random, low: float, high: float) -> float:
    return float(f"{math.exp(draw.uniform(math.log(low), math.log(high))):.4g}")


# name -> (its arguments, a random draw)
DISTRIBUTIONS: dict[str, tuple[str, Callable[..., Any]]] = {
    "uniform": ("[LOW, HIGH]", lambda draw, low, high: float(f"{draw.uniform(low, high):.4g}")),
    "log_uniform": ("[LOW, HIGH], both above 0", _log_uniform),
    "randint": ("[LOW, HIGH], both integers, HIGH included", lambda draw, low, high: draw.randint(low, high)),
    "choice": ("[VALUE, ...]", lambda draw, *values: draw.choice(values)),
}


class Sweep(Section, json_schema_extra=MAY_CHANGE):
    """How to run and rank the trials."""

    samples: int = Field(1, ge=1, description="random draws per grid point of the keys that have a distribution")
    seed: int = Field(0, ge=0, description="seed of the random draws")
    scheduler: Literal["fifo", "asha", "median_stopping_rule"] = Field(
        "fifo",
        description="scheduler of Ray Tune; asha and median_stopping_rule stop trials that fall behind at an "
        "evaluation (train.eval_every)",
    )
    scheduler_options: dict[str, Any] = Field(
        default_factory=dict,
        description="arguments of the scheduler, in steps: grace_period, reduction_factor, min_samples_required, ...",
    )
    metric: str | None = Field(
        None, description="key of result.json to rank by; default: val_loss; for finetuning held_out_weighted_f1"
    )
    mode: Literal["min", "max"] | None = Field(
        None, description="whether a lower or higher metric is better; default: by metric"
    )
    max_trials: int = Field(1000, ge=1, description="largest number of trials; a larger sweep is refused")
    concurrent: int | None = Field(
        None, ge=1, description="trials at the same time; default: as many as fit the cluster"
    )
    register_as: str | None = Field(
        None,
        description="name of the best model in MLflow's registry, alias best; default: run.name; none: do not register",
    )


class SweepConfig(PretrainConfig):
    """Settings of `finhpc sweep`: what its pretraining runs share, and how they differ."""

    grid: Annotated[dict[str, Any], AfterValidator(partial(check_grid, PretrainConfig))] = Field(
        default_factory=dict, description=GRID, json_schema_extra=MAY_CHANGE
    )
    sweep: Sweep = Field(default_factory=Sweep)
    run: Run = Field(default_factory=lambda: Run(name="sweep"))


class FinetuneSweepConfig(FinetuneConfig):
    """Settings of `finhpc sweep finetune`: what its finetuning runs share, and how they differ."""

    grid: Annotated[dict[str, Any], AfterValidator(partial(check_grid, FinetuneConfig))] = Field(
        default_factory=dict, description=GRID, json_schema_extra=MAY_CHANGE
    )
    sweep: Sweep = Field(default_factory=Sweep)
    run: Run = Field(default_factory=lambda: Run(name="sweep"))


class Variant(Section):
    """One way to train."""

    settings: dict[str, Any] = Field(default_factory=dict, description="settings that differ from the study's")
    lr: list[float] = Field(min_length=1, description="learning rates to screen")
    start: str | None = Field(
        None, description="variant whose trained model is the initial model; default: as in settings"
    )


class Study(Section):
    """Which variants to compare, and how."""

    variants: dict[str, Variant] = Field(default_factory=dict, description="name -> settings, lr, start")
    reference: str = Field("dense", description="variant that the others are compared with")
    screen_steps: int = Field(300, ge=1, description="steps of the screening runs; the finals take train.steps")
    widen: int = Field(
        3,
        ge=0,
        le=8,
        description="most learning rates that the screening adds to every grid, as long as the best one of any variant "
        "is the lowest or the highest that was tried; 0: none",
    )
    finalists: int = Field(
        2, ge=0, description="number of best variants that go on together with the reference; 0: all"
    )
    seeds: list[int] = Field([0, 1, 2], min_length=1, description="seeds of the finals; the screening uses the first")
    final_tokens: int = Field(
        1_000_000,
        ge=1,
        description="held-out tokens that every final model is scored on at its end, or the whole split if it has "
        "fewer; the evaluations before take data.eval_samples",
    )
    pace_steps: int = Field(20, ge=1, description="steps per round of step time measurements")
    pace_rounds: int = Field(3, ge=1, description="rounds of step time measurements; the finalists take turns")


class StudyConfig(PretrainConfig):
    """Settings of `finhpc study`: what its runs share, and how they differ."""

    study: Study = Field(default_factory=Study)
