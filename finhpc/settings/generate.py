"""Settings of `finhpc generate`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from finhpc.settings.base import Plugins, Section, plugins_field
from finhpc.settings.training import Resources


class Sampling(Section):
    """How the next token is chosen."""

    max_new_tokens: int = Field(128, ge=1, description="largest number of new tokens")
    temperature: float = Field(0.0, ge=0, description="0: greedy, the most likely token")
    top_p: float = Field(
        1.0, gt=0, le=1, description="sample from the most likely tokens that sum up to this probability"
    )
    top_k: int = Field(0, ge=0, description="sample from so many of the most likely tokens; 0: all")
    seed: int = Field(
        0,
        ge=0,
        description="seed of sampling; results depend on the position of a prompt in the input, not on its batch",
    )
    stop_at_eos: bool = Field(
        True, description="stop at an end token of generation_config.json, the tokenizer or its chat template"
    )


class GenerateConfig(Section):
    """Settings of `finhpc generate`."""

    model: str = Field("", description="model folder: `model` of a run, an export, or a Hugging Face folder; required")
    adapters: list[str] = Field(
        default_factory=list, description="NAME=FOLDER of peft adapters, all in memory (repeatable)"
    )
    adapter: str | None = Field(None, description="adapter of prompts that do not name one; default: the model alone")
    prompt: str | None = Field(None, description="one prompt; prompt, prompts or chat is required")
    prompts: str | None = Field(
        None,
        description='file of prompts: .jsonl with "prompt" and optionally "adapter", or text, a prompt per line; '
        "default: see prompt",
    )
    chat: bool = Field(False, description="chat with the model on this terminal")
    out: str | None = Field(None, description="new .jsonl file for the answers; default: only the screen")
    batch: int = Field(16, ge=1, description="prompts per batch, also with different adapters")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="type of the weights; auto: as in the model"
    )
    cache: bool = Field(True, description="cache keys and values; false: recompute all tokens each time")
    sampling: Sampling = Field(default_factory=Sampling)
    resources: Resources = Field(default_factory=Resources)
    plugins: Plugins = plugins_field()
