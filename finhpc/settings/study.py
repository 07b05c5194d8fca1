"""Settings of `finhpc study`."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from finhpc.settings.base import Section
from finhpc.settings.pretrain import PretrainConfig


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
