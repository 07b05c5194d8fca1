"""Settings of `finhpc study`."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from finhpc.settings.base import Section
from finhpc.settings.pretrain import PretrainConfig


class Variant(Section):
    """One way to train, beside the others of a study."""

    settings: dict[str, Any] = Field(default_factory=dict, description="sections of settings, over the study's own")
    lr: list[float] = Field(min_length=1, description="learning rates that are screened")
    start: str | None = Field(None, description="the variant whose trained model it starts from (model.path)")


class Study(Section):
    """Which variants of the run are compared, and how."""

    variants: dict[str, Variant] = Field(default_factory=dict, description="name -> settings, lr, start")
    reference: str = Field("dense", description="the variant that the others are compared with")
    screen_steps: int = Field(300, ge=1, description="steps of the screening; train.steps: of the finals")
    finalists: int = Field(2, ge=0, description="best variants that go on beside the reference; 0: all")
    seeds: list[int] = Field([0, 1, 2], min_length=1, description="seeds of the finals; the first also screens")
    pace_steps: int = Field(20, ge=1, description="steps a round in which a finalist's step time is measured")
    pace_rounds: int = Field(3, ge=1, description="such rounds, the finalists in turn")


class StudyConfig(PretrainConfig):
    """Settings of `finhpc study`: those that its runs share, and what they differ in."""

    study: Study = Field(default_factory=Study)
