"""OpenAI's API: what a request may hold, and its errors.

OpenAI's API reference (platform.openai.com/docs/api-reference), completions and chat; `top_k`, `ignore_eos` and the
loading of adapters are named as in vLLM. A parameter that is not supported is refused by name, unless it has the
value that changes nothing.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from finhpc.textfile import parse_json

INVALID, SERVER = "invalid_request_error", "server_error"
SEEDS = 1 << 63
FAILED = "The server failed on this request; its log names the error."
NO_EFFECT: dict[str, tuple[Any, ...]] = {  # not supported, with the values that change nothing
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "min_tokens": (0,),
    "logit_bias": ({},),
    "best_of": (1,),
    "suffix": ("",),
    "store": (False,),
    "metadata": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "skip_special_tokens": (True,),
    **dict.fromkeys(("audio", "prediction", "web_search_options", "reasoning_effort", "moderation", "verbosity"), ()),
}
HINTS = ("user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "service_tier")  # change no answer
KINDS = {"string_type": "must be text", "int_type": "must be a whole number", "missing": "is missing"}
KINDS |= {"float_type": "must be a number", "bool_type": "must be true or false", "list_type": "must be a list"}


class ApiError(Exception):
    """An answer that is an error. `param`: the parameter that caused it; `retry_s`: when to try again."""

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None, retry_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry_s = status, message, code, param, retry_s

    @property
    def body(self) -> dict[str, Any]:
        kind = INVALID if self.status < 500 and self.status != 429 else SERVER
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        retry = {} if self.retry_s is None else {"Retry-After": str(self.retry_s)}
        return retry | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(_Body):
    """What a stream has besides text."""

    include_usage: bool = False


class Sampled(_Body):
    """What completions and chats have in common."""

    model: str
    max_tokens: int | None = Field(None, ge=0)
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)
    seed: int | None = Field(None, ge=-SEEDS, lt=SEEDS)
    n: int = Field(1, ge=1)
    stop: str | list[str] = Field(default_factory=list)
    stream: bool = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop

    def first_seed(self) -> int:
        """Return the seed, or a random one."""
        return secrets.randbelow(SEEDS) if self.seed is None else self.seed % SEEDS


Ids = Annotated[list[int], Field(min_length=1)]


class Completion(Sampled):
    """A request to /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0)
    echo: bool = False


class TextPart(_Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(_Body):
    """One turn of a conversation."""

    role: str
    content: str | list[TextPart]
    name: str | None = None

    @property
    def plain(self) -> dict[str, str]:
        """The message as chat templates read it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class Chat(Sampled):
    """A request to /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=0)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0)


class LoadAdapter(_Body):
    """A request to /v1/load_lora_adapter."""

    lora_name: str
    lora_path: str


class UnloadAdapter(_Body):
    """A request to /v1/unload_lora_adapter."""

    lora_name: str


B = TypeVar("B", bound=_Body)


def parse(cls: type[B], body: bytes) -> B:
    """Read the body of a request. Raises `ApiError` for broken JSON and for what is not supported."""
    try:
        tree = parse_json(body.decode())
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ApiError(400, f"The body is not JSON ({reason}); correct it.", "invalid_json") from None
    if not isinstance(tree, dict):
        raise ApiError(400, "The body is not a JSON object; send one.", "invalid_json")
    given = {name: value for name, value in tree.items() if value is not None and name not in HINTS}
    if issubclass(cls, Sampled):
        for name in [name for name in given if name in NO_EFFECT and name not in cls.model_fields]:
            if given.pop(name) not in NO_EFFECT[name]:
                raise ApiError(400, f"{name} is not supported by this server; leave it out.", "unsupported", name)
    try:
        return cls.model_validate(given)
    except ValidationError as error:
        raise _explained(error) from None


def _explained(error: ValidationError) -> ApiError:
    """Return the first problem as an error; the parts of a union, such as those of a prompt, count as one."""
    items = error.errors(include_url=False, include_context=False, include_input=False)
    item = items[0]
    name = str(item["loc"][0])
    several = len({str(each["loc"]) for each in items if each["loc"][0] == name}) > 1
    where = name if several else ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return ApiError(400, f"{where} is not a parameter of this server; leave it out.", "unsupported", name)
    if several and name == "prompt":
        reason = "must be text, a list of texts, a list of ids, or a list of lists of ids"
    elif several and name == "stop":
        reason = "must be text or a list of texts"
    else:
        reason = KINDS.get(item["type"], item["msg"][0].lower() + item["msg"][1:])
    return ApiError(400, f"{where} {reason}; correct it.", "invalid_value", name)
