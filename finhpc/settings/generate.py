"""Settings of `finhpc generate`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from finhpc.settings.base import Plugins, Section, plugins_field
from finhpc.settings.training import Resources


class Sampling(Section):
    """How the next token is chosen."""

    max_new_tokens: int = Field(128, ge=1, description="tokens generated at most")
    temperature: float = Field(0.0, ge=0, description="0: greedy, the likeliest token")
    top_p: float = Field(1.0, gt=0, le=1, description="of the likeliest tokens that make up this probability")
    top_k: int = Field(0, ge=0, description="of so many likeliest tokens; 0: all")
    seed: int = Field(
        0, ge=0, description="of the draws; a prompt's own depend on its place in the input, not its batch"
    )
    stop_at_eos: bool = Field(
        True, description="end at an end token of generation_config.json, the tokenizer or its chat template"
    )


class GenerateConfig(Section):
    """Settings of `finhpc generate`."""

    model: str = Field("", description="a model folder: a run's `model`, an export, or a Hugging Face folder")
    adapters: list[str] = Field(
        default_factory=list, description="NAME=FOLDER of peft's adapters over it, all in memory (repeat for several)"
    )
    adapter: str | None = Field(None, description="the adapter of prompts that name none; default: the model alone")
    prompt: str | None = Field(None, description="one prompt; this, prompts or chat is required")
    prompts: str | None = Field(
        None,
        description='a file: .jsonl with "prompt" and perhaps "adapter" a line, or text, a prompt per line; '
        "default: see prompt",
    )
    chat: bool = Field(False, description="talk with the model here; words appear as they are made")
    out: str | None = Field(None, description="new .jsonl file for the answers; default: the screen alone")
    batch: int = Field(16, ge=1, description="prompts computed at once, whatever their adapters")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto: as in the model's config.json")
    cache: bool = Field(True, description="keep keys and values of past tokens; false: compute all again each time")
    sampling: Sampling = Field(default_factory=Sampling)
    resources: Resources = Field(default_factory=Resources)
    plugins: Plugins = plugins_field()
