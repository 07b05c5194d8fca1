"""Settings of `finhpc generate` and `finhpc serve`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from finhpc.settings.base import LocalPath, Plugins, Section, absolute_path, plugins_field
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


def _absolute_entry(entry: str) -> str:
    name, equals, path = entry.partition("=")
    return f"{name}={absolute_path(path)}" if equals else absolute_path(entry)


AdapterEntry = Annotated[str, AfterValidator(_absolute_entry)]


class Cache(Section):
    """Keys and values of the requests in work, in blocks that requests share."""

    bytes: int | None = Field(
        None,
        ge=1,
        description="memory for the cache of each replica; default: limits.max_running requests of the whole context, "
        "but at most a quarter of this machine's free memory",
    )
    block_size: int = Field(32, ge=1, description="tokens per block")
    prefill_tokens: int = Field(512, ge=1, description="prompt tokens computed per pass, between the others' new ones")


class Limits(Section):
    """What a client may ask for, and how much at once. All but the adapters' limits hold for each replica."""

    max_running: int = Field(32, ge=1, description="requests computed in one batch")
    max_queue: int = Field(256, ge=0, description="requests that wait; further ones are refused with 429")
    max_prompt_tokens: int | None = Field(None, ge=1, description="longest prompt; default: the model's context")
    max_new_tokens: int = Field(1024, ge=1, description="most new tokens of a request")
    max_choices: int = Field(128, ge=1, description="most prompts times n of a request")
    max_logprobs: int = Field(20, ge=0, description="most alternatives per token")
    max_body_bytes: int = Field(4 << 20, ge=1024, description="largest body of a request; beyond it: 413")
    body_timeout_s: float = Field(10, gt=0, description="seconds in which a client must send its request; else 408")
    request_timeout_s: float = Field(
        300, gt=0, description="seconds for a request, waiting included; unfinished ones end with 504"
    )
    max_adapters: int = Field(32, ge=0, description="most adapters in memory")
    max_adapter_rank: int = Field(64, ge=1, description="highest rank of an adapter")


class ServeConfig(Section):
    """Settings of `finhpc serve`."""

    model: str = Field("", description="model folder: `model` of a run, an export, or a Hugging Face folder; required")
    name: str | None = Field(None, description="the model's name in the API; default: from its path")
    adapters: list[AdapterEntry] = Field(
        default_factory=list, description="NAME=FOLDER of peft adapters, served as MODEL:NAME (repeatable)"
    )
    adapter_root: list[LocalPath] = Field(
        default_factory=list,
        description="folders below which clients may load adapters while it runs, such as a storage of runs "
        "(repeatable); default: only adapters given at the start",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="type of the weights; auto: as in the model"
    )
    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0: every network of this machine")
    port: int = Field(8000, ge=1, le=65535, description="port to listen on")
    token_file: LocalPath | None = Field(
        None,
        description="file with the token that clients must give; default: the environment variable FINHPC_SERVE_TOKEN, "
        "or a new token that is printed once",
    )
    replicas: int = Field(1, ge=1, description="copies of the model, each with its own cache")
    drain_s: float = Field(30, ge=0, description="seconds for running requests to finish when the server is stopped")
    state: LocalPath | None = Field(
        None,
        description="folder that all replicas see, for the list of adapters loaded while it runs; default: a temporary "
        "one",
    )
    cache: Cache = Field(default_factory=Cache)
    limits: Limits = Field(default_factory=Limits)
    resources: Resources = Field(default_factory=Resources)
    plugins: Plugins = plugins_field()
