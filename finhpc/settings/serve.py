"""Settings of `finhpc serve`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from finhpc.settings.base import LocalPath, Plugins, Section, absolute_path, plugins_field
from finhpc.settings.training import Resources


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
