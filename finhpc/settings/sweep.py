"""Settings of a sweep: one run's settings, the keys that vary, and how its trials are run."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from finhpc.settings.base import Section
from finhpc.settings.finetune import FinetuneConfig
from finhpc.settings.grid import check_grid
from finhpc.settings.pretrain import PretrainConfig
from finhpc.settings.training import Run

GRID = (
    "KEY=[VALUES], every combination is a trial; or KEY={uniform: [LOW, HIGH]}, log_uniform, randint or choice, drawn "
    "sweep.samples times"
)


class Sweep(Section):
    """How the trials are run and ranked."""

    samples: int = Field(1, ge=1, description="draws of the keys that have a distribution, for each grid point")
    seed: int = Field(0, ge=0, description="of those draws")
    scheduler: Literal["fifo", "asha", "median_stopping_rule"] = Field(
        "fifo",
        description="Ray Tune's scheduler; asha and median_stopping_rule end trials that fall behind, judged at "
        "evaluations (train.eval_every)",
    )
    scheduler_options: dict[str, Any] = Field(
        default_factory=dict,
        description="its own arguments, in steps: grace_period, reduction_factor, min_samples_required, ...",
    )
    metric: str | None = Field(
        None, description="key of result.json that ranks; default: val_loss, of finetuning held_out_weighted_f1"
    )
    mode: Literal["min", "max"] | None = Field(None, description="whether less or more is better; default: by metric")
    max_trials: int = Field(1000, ge=1, description="a sweep of more trials is refused")
    concurrent: int | None = Field(
        None, ge=1, description="trials at a time; default: as many as the cluster has room for"
    )
    register_as: str | None = Field(
        None, description="name of the best model in MLflow's registry, alias best; default: run.name; none: no"
    )


class SweepConfig(PretrainConfig):
    """Settings of `finhpc sweep`: those that its pretrainings share, and what they differ in."""

    grid: Annotated[dict[str, Any], AfterValidator(partial(check_grid, PretrainConfig))] = Field(
        default_factory=dict, description=GRID
    )
    sweep: Sweep = Field(default_factory=Sweep)
    run: Run = Field(default_factory=lambda: Run(name="sweep"))


class FinetuneSweepConfig(FinetuneConfig):
    """Settings of `finhpc sweep finetune`."""

    grid: Annotated[dict[str, Any], AfterValidator(partial(check_grid, FinetuneConfig))] = Field(
        default_factory=dict, description=GRID
    )
    sweep: Sweep = Field(default_factory=Sweep)
    run: Run = Field(default_factory=lambda: Run(name="sweep"))
